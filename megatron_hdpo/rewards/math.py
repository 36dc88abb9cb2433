"""Binary reward for mathematical answers, by math-verify.

math-verify limits its own time by SIGALRM, which works only on main threads and is swallowed by broad `except` clauses.
Its limits are switched off here; `rewards.pool` runs these functions in worker processes that it can kill.

Strings never replace expressions: math-verify's string fallback cuts `a + b + c` down to `a +`, which then equals `a +
d`. A gold answer must parse to an expression, and a prediction that does not parse is wrong unless its text equals the
gold answer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import sympy
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from megatron_hdpo.rewards.bounds import TooLargeError, check_size
from megatron_hdpo.rewards.extraction import AnswerFormat, ExtractedAnswer, extract_answer, trim

_TARGETS: Sequence[Any] = (LatexExtractionConfig(), ExprExtractionConfig())
_MEANINGLESS = (sympy.zoo, sympy.nan)


class GoldError(ValueError):
    """A gold answer that is no mathematical expression: an error of the data, not of a response."""


@lru_cache(maxsize=4096)
def parse_gold(answer: str) -> tuple[Any, ...]:
    """Return the expressions of a gold answer.

    Raises GoldError when math-verify finds none, or one without a value (1/0, which it also makes of clock times such
    as `05:00`).
    """
    expressions = _parse(_boxed(trim(answer)))
    if not expressions:
        raise GoldError(f"gold answer {answer!r} is not an expression that math-verify can read")
    if any(expression in _MEANINGLESS for expression in expressions):
        raise GoldError(f"gold answer {answer!r} has no value: math-verify reads it as {expressions[0]}")
    return tuple(expressions)


def score_math(gold: str, response: str, answer_format: AnswerFormat = "boxed") -> float:
    """Return 1.0 when the final answer of `response` equals `gold` mathematically, else 0.0.

    An answer that takes too long to evaluate (`bounds.py`) is wrong unless its text is the gold answer's.

    Raises GoldError for a gold answer that cannot be parsed, and any error of math-verify when a comparison breaks
    down: that is a failed check, not a wrong answer.
    """
    gold_expressions = list(parse_gold(gold))
    answer = extract_answer(response, answer_format)
    if answer is None:
        return 0.0
    if answer.text == trim(gold):
        return 1.0
    try:
        check_size(answer.text)
    except TooLargeError:
        return 0.0  # what the answer says is at fault, not the check: the gold answer's text is all that equals it
    predictions = _parse_prediction(answer)
    # The order matters: math-verify simplifies assignments and intervals on the prediction's side only.
    return float(bool(predictions) and verify(gold_expressions, predictions, timeout_seconds=None, raise_on_error=True))


def _parse_prediction(answer: ExtractedAnswer) -> list[Any]:
    """Parse a delimited answer as a whole; of a sentence, let math-verify search the last expression."""
    if answer.source in ("phrase", "line"):
        return _parse(answer.text)
    return _parse(_boxed(answer.text))


def _parse(text: str) -> list[Any]:
    return list(parse(text, _TARGETS, fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=True))


def _boxed(answer: str) -> str:
    return "\\boxed{" + answer + "}"
