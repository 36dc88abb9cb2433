r"""Find the final answer in a response.

The rule, in this order:

1. Thinking is not an answer: everything up to the last `</think>` is cut away. A `<think>` that is never closed hides
   the rest of the response: one that was cut off inside its thoughts has not answered.
2. The last `\boxed{...}` (or `\fbox{...}`), its braces matched, is the answer. A last box that is never closed is no
   answer, and earlier boxes do not stand in for it: they may hold intermediate results.
3. Only with `answer_format: lenient`, and only where there is no box at all: the last `<answer>...</answer>`, else the
   text after the last `####`, else the text after the last "answer is" or "answer:", else the last line with text.

The default is `boxed`, without any of the fallbacks of 3: they reward guesses at the format.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

AnswerFormat = Literal["boxed", "lenient"]
AnswerSource = Literal["box", "tag", "hashes", "phrase", "line"]

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_ESCAPED_OR_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_HASHES = re.compile(r"####[ \t]*(.+)")
_PHRASE = re.compile(r"\banswer(?:\s+is|\s*:)\s*:?[ \t]*", re.IGNORECASE)
_TRAILING_PUNCTUATION = re.compile(r"(?<!\\)(?<!\\right)[.,;:\s]+$")


@dataclass(frozen=True)
class ExtractedAnswer:
    """text: the answer, trimmed, never empty. source: which rule found it; only box and tag delimit it exactly."""

    text: str
    source: AnswerSource


def visible_text(response: str) -> str:
    """The response without its thoughts: what follows the last `</think>`, up to a `<think>` that is never closed."""
    return response.rpartition("</think>")[2].partition("<think>")[0]


def last_boxed(text: str) -> str | None:
    r"""Content of the last box in `text`; None without a box or when the last one is never closed.

    Braces written as `\{` and `\}` are text, not structure.
    """
    starts = list(_BOX.finditer(text))
    if not starts:
        return None
    begin, depth = starts[-1].end(), 1
    for match in _ESCAPED_OR_BRACE.finditer(text, begin):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return text[begin : match.start()]
    return None


def extract_answer(response: str, answer_format: AnswerFormat = "boxed") -> ExtractedAnswer | None:
    """The final answer of a response, None when it has none by the rule of this module."""
    text = visible_text(response)
    if _BOX.search(text):
        return _answer(last_boxed(text), "box")
    if answer_format == "boxed":
        return None
    candidates: list[tuple[str | None, AnswerSource]] = [
        (_last_group(_TAG, text), "tag"),
        (_last_group(_HASHES, text), "hashes"),
        (_after_last(_PHRASE, text), "phrase"),
        (_last_line(text), "line"),
    ]
    found = (_answer(candidate, source) for candidate, source in candidates)
    return next((answer for answer in found if answer is not None), None)


def trim(answer: str) -> str:
    """Without surrounding space and without the full stop or comma that ends a sentence."""
    return _TRAILING_PUNCTUATION.sub("", answer.strip())


def _answer(text: str | None, source: AnswerSource) -> ExtractedAnswer | None:
    trimmed = trim(text) if text is not None else ""
    return ExtractedAnswer(trimmed, source) if trimmed else None


def _last_group(pattern: re.Pattern[str], text: str) -> str | None:
    matches = pattern.findall(text)
    return str(matches[-1]) if matches else None


def _after_last(pattern: re.Pattern[str], text: str) -> str | None:
    """The rest of the line after the last match."""
    ends = [match.end() for match in pattern.finditer(text)]
    return text[ends[-1] :].partition("\n")[0] if ends else None


def _last_line(text: str) -> str | None:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else None
