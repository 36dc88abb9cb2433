"""Answers that nobody can evaluate are refused at once, and no others."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hdpo.rewards.bounds import MOST_CHARACTERS, TooLargeError, check_size
from megatron_hdpo.rewards.math import score_math

TOO_LARGE = [
    "9^{9^{9}}",
    "9^{9^{9^{9}}}",
    "x^{9^{9^9}}",
    "2**2**2**2**2**2",
    "2^2^2^2^2^2",
    "(10^{9999})^{9999}",
    "(((10^{99})^{99})^{99})^{99}",
    "100000000!",
    "(10^8)!",
    "9!!!!",
    "\\binom{1000000000}{500000000}",
    "2^{1,000,000,000}",
    "7" * 12_000,
    "{" * 5_000,
    "-" + "9^" * 5_000 + "9",
    "1 + " * 20_000,
]
FINE = [
    "2^{2023}",
    "x^{10}+x^{9}+3x^{8}+7x^{7}+5x^{6}+2x^{5}+x^{4}+x^{3}+x^{2}+x+1",
    "100!",
    "\\binom{2024}{1012}",
    "\\frac{3^{100}-1}{2}",
    "10^{-20}",
    "3.14159265358979323846264338327950288419716939937510",
    "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}",
    "e^{i\\pi}",
    "1,2,3,4,5,6,7,8,9,10",
    "5^{3^{2}}",
    "]}) unbalanced ^ ! \\binom",
    "",
]


@pytest.mark.parametrize("text", TOO_LARGE, ids=lambda text: text[:30])
def test_refused_at_once(text: str) -> None:
    begin = time.perf_counter()
    with pytest.raises(TooLargeError):
        check_size(text)
    assert time.perf_counter() - begin < 1


@pytest.mark.parametrize("text", FINE)
def test_not_refused(text: str) -> None:
    check_size(text)


@given(st.text(alphabet="0123456789x^!{}()[]\\binom*,. ", max_size=400))
def test_any_text_is_fine_or_too_large(text: str) -> None:
    try:
        check_size(text)
    except TooLargeError:
        return


def test_such_an_answer_is_wrong_unless_its_text_is_the_golds() -> None:
    assert score_math("7", "\\boxed{9^{9^{9}}}") == 0.0
    assert score_math("7", "\\boxed{" + "7" * (MOST_CHARACTERS + 1) + "}") == 0.0
    assert score_math("2^{64}", "\\boxed{18446744073709551616}") == 1.0
