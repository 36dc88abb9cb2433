"""What stands around an answer is taken away, and nothing of the answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hdpo.rewards.around import bare, plain
from megatron_hdpo.rewards.extraction import trim

AROUND = ["$%$", "$$%$$", r"\(%\)", r"\[%\]", "**%**", r"\mathbf{%}", r"\boldsymbol{%}", r"\bm{%}", "{%}", r"\large %"]
AROUND += [r"\displaystyle %", r"{\bf %}", r"\textcolor{red}{%}", "%.", r"%\\", r"%\$", " % "]


@pytest.mark.parametrize("answer", ["5", r"\frac{1}{2}", r"\{1, 2\}", r"\text{red}", r"\mathbf{a} + \mathbf{b}"])
@pytest.mark.parametrize("marks", AROUND)
def test_marks_around_the_whole(marks: str, answer: str) -> None:
    assert bare(marks.replace("%", answer)) == answer


@given(st.lists(st.sampled_from(AROUND[:-2]), max_size=3, unique=True), st.sampled_from(["5", r"\frac{1}{2}", "x^{2}"]))
def test_marks_within_marks(marks: list[str], answer: str) -> None:
    text = answer
    for mark in marks:
        text = mark.replace("%", text)
    assert bare(text) == answer


@pytest.mark.parametrize(
    "answer", [r"\frac{1}{2}", "{1} + {2}", r"\mathbf{a} + \mathbf{b}", "{}", r"\$5", r"5\,", r"\{1\}", "**", "a ** b"]
)
def test_an_answer_without_marks_stays(answer: str) -> None:
    assert bare(answer) == answer


@given(st.text(alphabet="$*\\()[]{}5 .mathbf", max_size=30))
def test_any_text_loses_no_digit(text: str) -> None:
    assert bare(text).count("5") == trim(text).count("5") == plain(text).count("5")


@pytest.mark.parametrize(
    ("answer", "text"),
    [(r"$\text{263}$", "263"), (r"\textbf{$x = 6$}", "6"), ("x = -2.5", "-2.5"), ("x = y", "x = y"), ("a b", "a b")],
)
def test_plain_text(answer: str, text: str) -> None:
    assert plain(answer) == text
