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
    """A final answer and the rule that found it.

    text: the answer, trimmed, never empty. source: the rule; only box and tag delimit the answer exactly.
    """

    text: str
    source: AnswerSource


def visible_text(response: str) -> str:
    """Return the response without its thoughts: the text after the last `</think>`, up to an unclosed `<think>`."""
    return response.rpartition("</think>")[2].partition("<think>")[0]


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last box in `text`; None without a box or when the last one is never closed.

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
    """Return the final answer of a response by the rule of this module; None when there is none."""
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
    """Return the text without surrounding space and without the full stop or comma that ends a sentence."""
    return _TRAILING_PUNCTUATION.sub("", answer.strip())


def _answer(text: str | None, source: AnswerSource) -> ExtractedAnswer | None:
    trimmed = trim(text) if text is not None else ""
    return ExtractedAnswer(trimmed, source) if trimmed else None


def _last_group(pattern: re.Pattern[str], text: str) -> str | None:
    matches = pattern.findall(text)
    return str(matches[-1]) if matches else None


def _after_last(pattern: re.Pattern[str], text: str) -> str | None:
    """Return the rest of the line after the last match."""
    ends = [match.end() for match in pattern.finditer(text)]
    return text[ends[-1] :].partition("\n")[0] if ends else None


def _last_line(text: str) -> str | None:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else None
