"""Responses that give their help away, and harmless ones that must not be dropped."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from megatron_hdpo.data.leakage import LeakageConfig, find_leak

MARKERS = ("[REFERENCE]", "[END OF REFERENCE]")

LEAKS = [
    "As given, the answer is 5.",
    "The provided solution adds the two.",
    "This matches the reference answer.",
    "The given answer is 12, so we check it.",
    "According to the solution, x = 2.",
    "From the reference we know that x = 2.",
    "We are told the final answer is 7.",
    "The answer is given as 7.",
    "the  supplied\nsolution says so",
    "[reference] 2 + 2 = 4",
    "[END OF\nREFERENCE]",
    "consistent with the correct answer",
    "The answer is given by the reference.",
    "The solution is given in the prompt.",
    "According to the solution of the problem, x = 2.",
    "From the solution to this question, x = 2.",
    "From the solution, we see that x = 2.",
    "We know from the solution that x = 2.",
    "So from the answer we work backwards.",
    "The answer is given: 7.",
    "The correct answer is known to be 7.",
    "As given in the reference, x = 2.",
    "As given in the solution, x = 2.",
    "Based on the final answer, the steps must be these.",
    "The answer was provided.",
    "We are given the answer 7.",
    "I was given the final answer of 7.",
    "According to the answer key, it is B.",
    "The final answer is stated in the prompt.",
    "We are given that the solution is x = 2.",
    "According to the solution in the prompt, x = 2.",
    "This matches the final answer.",
    "The known answer is 7.",
    "The official solution uses induction.",
    "the reference above",
    "From the provided answer we work backwards.",
    "According to the reference, it is 3.",
    "The solution is given by the reference text.",
    "Based on the answer given, we choose 7.",
    "The answer to the problem is given as 7.",
]

HARMLESS = [
    "The answer is 5.",
    "As given in the problem, x > 0.",
    "From the given answer choices, B fits.",
    "Given that x = 2, the solution of the equation is 4.",
    "We are given that x is even, so the answer is 2.",
    "The solution is x = 3, and the final answer is \\boxed{3}.",
    "With reference to the figure, the angle is 30.",
    "2 + 2 = 4\n\\boxed{4}",
    "",
    # The solution of a part, of an equation, of the writer's own, in a formula, or a liquid.
    "The solution is given by x = 2.",
    "From the solution of the first equation, y = 3.",
    "The general solution is given by y = C e^x.",
    "The solution is given by the quadratic formula.",
    "The answer is given in radians.",
    "The answer is given as a fraction in lowest terms.",
    "The solution is known to exist and to be unique.",
    "The answer is known to be an integer between 0 and 999.",
    "As given by Vieta's formulas, the sum is 5.",
    "As given by equation (1), x > 0.",
    "As given in part (a), the rate is 3.",
    "Based on the solution to part (a), we get 7.",
    "From the solution set {1, 2} we take the larger.",
    "This matches the answer we found by substitution.",
    "This is consistent with the solution obtained above.",
    "Then 3 liters are removed from the solution.",
    "The water evaporates from the solution.",
    "We are told that the solution contains 20% salt.",
    "We are told that the answer must be an integer.",
    "We are told the answer is of the form m/n.",
    "We are given the solution set {1, 2}.",
    "Using the known solution of the homogeneous equation, we vary the constant.",
    "The given solution contains 5 g of salt.",
    "The given solution is 30% acid.",
    "Measured from the reference point, the distance is 5.",
    "Based on the reference angle, sin is 1/2.",
    "From the solution to this system, x = 1.",
    "According to the answer to part (b), k = 3.",
    "From the answer we computed above, subtract 1.",
    "From the solution of 2x = 4, the side is 2.",
    "From the answer of 1/2 x = 4, x = 8.",
    "Since the final answer is given in simplest form, we stop.",
    "The particular solution is known, so add it.",
]


@pytest.mark.parametrize("response", LEAKS)
def test_leaks_are_found(response):
    assert find_leak(response, MARKERS)


@pytest.mark.parametrize("response", HARMLESS)
def test_harmless_responses_pass(response):
    assert find_leak(response, MARKERS) is None


SPACES = st.sampled_from([" ", "\n", "\n\n", "  "])
WRITTEN = st.sampled_from([str, str.upper, str.lower])
SENTENCES = [sentence for sentence in HARMLESS if sentence.endswith(".")]


@given(st.lists(st.tuples(st.sampled_from(SENTENCES), SPACES, WRITTEN), max_size=8))
def test_no_text_of_harmless_sentences_is_a_leak(written):
    assert find_leak("".join(write(sentence) + space for sentence, space, write in written), MARKERS) is None


@given(st.lists(st.sampled_from(SENTENCES), max_size=4), st.sampled_from(LEAKS), st.integers(0, 4), SPACES, WRITTEN)
def test_a_leak_is_found_among_harmless_sentences(others, leak, place, space, write):
    others.insert(place, leak.replace(" ", space))
    assert find_leak(write(" ".join(others)), MARKERS)


def test_the_leaking_piece_is_quoted():
    assert find_leak("So, AS GIVEN, it is 5") == "AS GIVEN"
    assert find_leak("x [a.b] y", ["[a.b]"]) == "[a.b]"
    assert find_leak("x ab y", ["[a.b]"]) is None


def test_phrases_are_configurable():
    config = LeakageConfig(phrases=["cheat( ?)sheet"])
    assert find_leak("from my Cheat Sheet", (), config.phrases) == "Cheat Sheet"
    assert find_leak("as given", (), config.phrases) is None
    assert find_leak("as given", (), ()) is None
    with pytest.raises(ValidationError, match="is not a regular expression"):
        LeakageConfig(phrases=["("])
