"""The behaviours of math-verify that the rewards rely on, and where this project decides otherwise."""

from __future__ import annotations

import threading

import pytest

from megatron_hdpo.rewards.exact import score_exact
from megatron_hdpo.rewards.math import GoldError, parse_gold, score_math

RIGHT = [
    ("1000", "1,000"),
    ("1,2,3", "3,1,2"),
    ("(1,2)", r"\{1,2\}"),
    (r"\frac{1}{2}", r"50\%"),
    (r"\frac{1}{2}", "50%"),
    (r"\frac{1}{2}", "0.50000001"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac12", r"\dfrac{1}{2}"),
    ("5", "x=5"),
    ("18", r"\$18"),
    ("18", "18."),
    ("18", r"18 \text{ dollars}"),
    ("x+1", "1+x"),
    ("-3", "\N{MINUS SIGN}3"),
    ("7.", "7"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
]

WRONG = [
    ("1000", "1001"),
    ("1,2,3", "1,2"),
    ("(1,2)", "[1,2]"),
    ("5", "5.1"),
    ("5", "not a number {"),
    ("5", r"\frac{1}{0}"),
    ("5", r"\begin{pmatrix} 5 \\ 5 \end{pmatrix}"),
    ("x+1", "x+2"),
    (r"\frac{1}{2}", "0.501"),
]


@pytest.mark.parametrize(("gold", "answer"), RIGHT)
def test_equal_answers_are_right(gold, answer):
    assert score_math(gold, rf"hence \boxed{{{answer}}}") == 1.0


@pytest.mark.parametrize(("gold", "answer"), WRONG)
def test_other_answers_are_wrong(gold, answer):
    assert score_math(gold, rf"hence \boxed{{{answer}}}") == 0.0


def test_the_last_box_counts_and_boxes_in_thoughts_do_not():
    assert score_math("2", r"\boxed{1} or \boxed{2}") == 1.0
    assert score_math("2", r"\boxed{2} or \boxed{1}") == 0.0
    assert score_math("1", r"<think>\boxed{1}</think> it is 2") == 0.0


def test_an_answer_without_a_box_counts_in_the_lenient_format_only():
    response = "So the answer is 12 apples."
    assert score_math("12", response) == 0.0
    assert score_math("12", response, "lenient") == 1.0


@pytest.mark.parametrize("gold", ["", " ", "{", r"05\!:\!00", r"\frac{1}{0}", "a + b +", "7 @ 5"])
def test_gold_that_is_no_expression_is_an_error_of_the_data(gold):
    with pytest.raises(GoldError, match="gold answer"):
        parse_gold(gold)
    with pytest.raises(GoldError):
        score_math(gold, r"\boxed{1}")


def test_scoring_works_off_the_main_thread():
    """With its own time limits on, math-verify raises there, and a broad except makes that a wrong answer."""
    rewards = []
    thread = threading.Thread(target=lambda: rewards.append(score_math("x+1", r"\boxed{1+x}")))
    thread.start()
    thread.join()
    assert rewards == [1.0]


@pytest.mark.parametrize(
    ("gold", "answer", "reward"),
    [
        ("Monday", "monday.", 1.0),
        (r"\text{(E)}", "(E)", 1.0),
        ("two  words", "Two words", 1.0),
        ("$A$", "A", 1.0),
        ("abc", "bca", 0.0),  # the same product of symbols to math-verify
        ("A", "B", 0.0),
    ],
)
def test_exact_match_ignores_case_spacing_and_text_commands(gold, answer, reward):
    assert score_exact(gold, rf"\boxed{{{answer}}}") == reward


def test_exact_match_of_nothing_is_wrong():
    assert score_exact("", r"\boxed{.}") == score_exact("A", "A") == 0.0
