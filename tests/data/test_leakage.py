"""Responses that give their help away, and harmless ones that must not be dropped."""

from __future__ import annotations

import pytest
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
]


@pytest.mark.parametrize("response", LEAKS)
def test_leaks_are_found(response):
    assert find_leak(response, MARKERS)


@pytest.mark.parametrize("response", HARMLESS)
def test_harmless_responses_pass(response):
    assert find_leak(response, MARKERS) is None


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
