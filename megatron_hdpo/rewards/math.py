r"""Binary reward for mathematical answers.

An answer in a box or a tag is one text. `spelling` writes it in one way, and it equals the gold answer when the texts
are the same, or both are words and the same words (`words`), or the expressions of both are equal (`expressions`).
What does not parse as a whole has no expression: no number is ever picked out of it. A gold answer must be words or
parse as a whole. Only in the lenient format, a sentence is also searched for its last expression.

Expressions that take too long to evaluate (`bounds`) are compared as text.

The libraries that parse and compare have no limits of time here; `rewards.pool` runs these functions in worker
processes that it can kill.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from megatron_hdpo.rewards.bounds import MOST_CHARACTERS, TooLargeError, check_size
from megatron_hdpo.rewards.expressions import equal, has_value, parse_whole, search
from megatron_hdpo.rewards.extraction import AnswerFormat, ExtractedAnswer, extract_answer, trim
from megatron_hdpo.rewards.spelling import Spelling, spell
from megatron_hdpo.rewards.words import is_words, words_of

_LOOSE_SPACE = re.compile(r" (?!\w)|(?<!\w) ")
_WORDS = re.compile(r"\\text\s*\{[^{}]*[A-Za-z]|(?<![\\A-Za-z])[A-Za-z]{2,}")
_ONE_CHARACTER = re.compile(r"\{(\w)\}")


class GoldError(ValueError):
    """A gold answer that is no mathematical expression: an error of the data, not of a response."""


@dataclass(frozen=True)
class Gold:
    """A gold answer. words: for one that is compared as words. expression: None when nothing but its text equals it."""

    spelling: Spelling
    words: tuple[str, ...] | None = None
    expression: Any = None


@lru_cache(maxsize=4096)
def parse_gold(answer: str) -> Gold:
    """Return a gold answer as it is compared.

    Raises GoldError when it is neither words nor parses as a whole, and when it has no value (1/0, which the parser
    also makes of clock times such as `05:00`).
    """
    spelling = spell(answer)
    if is_words(spelling.written):
        return Gold(spelling, words=words_of(spelling.written))
    try:
        check_size(spelling.text)
    except TooLargeError:
        return Gold(spelling)
    expression = parse_whole(spelling.text)
    if expression is None:
        raise GoldError(f"gold answer {answer!r} is not an expression that can be read as a whole")
    if not has_value(expression):
        raise GoldError(f"gold answer {answer!r} has no value: it is read as {expression}")
    return Gold(spelling, expression=expression)


def score_math(gold: str, response: str, answer_format: AnswerFormat = "boxed") -> float:
    """Return 1.0 when the final answer of `response` equals `gold` mathematically, else 0.0.

    Raises GoldError for a gold answer that cannot be read, and any error of a comparison that breaks down: that is a
    failed check, not a wrong answer.
    """
    right = parse_gold(gold)
    answer = extract_answer(response, answer_format)
    if answer is None or len(answer.text) > MOST_CHARACTERS:
        return 0.0
    return float(answer.text == trim(gold) or _equals(right, answer))


def _equals(gold: Gold, found: ExtractedAnswer) -> bool:
    answer = spell(found.text)
    if gold.words is not None:
        return words_of(answer.written) == gold.words
    if _both_differ(gold.spelling.base, answer.base) or _both_differ(gold.spelling.unit, answer.unit):
        return False
    if _without_braces(answer.text) == _without_braces(gold.spelling.text):
        return True
    if gold.expression is None:
        return False
    try:
        check_size(answer.text)
    except TooLargeError:
        return False  # what the answer says is at fault, not the check
    if gold.expression == 0 and _WORDS.search(answer.text.rpartition("=")[2]):
        return False  # the parser takes words for letters, and 0 times a letter is 0: `\text{not } 0`
    expression = parse_whole(answer.text)
    if expression is not None and equal(gold.expression, expression):
        return True
    return found.source in ("phrase", "line") and _holds(found.text, gold)


def _both_differ(a: str | None, b: str | None) -> bool:
    return a is not None and b is not None and a != b


def _holds(sentence: str, gold: Gold) -> bool:
    """Return whether the last expression that a sentence holds is the gold answer."""
    expression = search(sentence)
    return expression is not None and equal(gold.expression, expression)


def _without_braces(text: str) -> str:
    """Return the text without braces around one character, `9^{9}` as `9^9`, and without spaces but between words."""
    return _LOOSE_SPACE.sub("", _ONE_CHARACTER.sub(r"\1", text))
