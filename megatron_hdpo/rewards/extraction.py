r"""Find the final answer in a response.

The rule, in this order:

1. Thinking is not an answer: everything up to the last `</think>` is cut away. A `<think>` that is never closed hides
   the rest of the response: one that was cut off inside its thoughts has not answered.
2. The last `\boxed{...}` (or `\fbox{...}`), its braces matched, is the answer. A last box that is never closed is no
   answer, and earlier boxes do not stand in for it: they may hold intermediate results.
3. Only with `answer_format: lenient`, and only where there is no box at all: the last `<answer>...</answer>`, else the
   line after the last `####`, else what the last "answer is" or "answer:" says (below), else the last line with text.
4. What a sentence says is the formula in dollar signs that it begins with, else its text up to the first comma, full
   stop or semicolon that a space follows, outside of brackets. "The answer is not 42" says nothing.

The default is `boxed`, without any of the fallbacks of 3: they reward guesses at the format. All of it takes a time
proportional to the length of the response.
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from typing import Literal

AnswerFormat = Literal["boxed", "lenient"]
AnswerSource = Literal["box", "tag", "hashes", "phrase", "line"]

THOUGHT_BEGIN, THOUGHT_END = "<think>", "</think>"

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_ESCAPED_OR_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_PHRASE = re.compile(r"\banswer(?:\s+is|\s*:)\s*:?[ \t]*", re.IGNORECASE)
_DENIAL = re.compile(r"(?:\*\*)?not\b", re.IGNORECASE)
_FORMULA = re.compile(r"\$\$?([^$]+)\$")
_BRACKET_OR_PAUSE = re.compile(r"[{}()\[\]]|[,.;](?=\s|$)|\n")
_PUNCTUATION = ".,;:" + string.whitespace


@dataclass(frozen=True)
class ExtractedAnswer:
    """A final answer and the rule that found it.

    text: the answer, trimmed, never empty. source: the rule; only box and tag delimit the answer exactly.
    """

    text: str
    source: AnswerSource


def visible_text(response: str) -> str:
    """Return the response without its thoughts: the text after the last `</think>`, up to an unclosed `<think>`."""
    return response.rpartition(THOUGHT_END)[2].partition(THOUGHT_BEGIN)[0]


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last box in `text`; None without a box or when the last one is never closed.

    Braces written as `\{` and `\}` are text, not structure.
    """
    begin = max((match.end() for match in _BOX.finditer(text)), default=-1)
    end = closing_brace(text, begin) if begin >= 0 else None
    return None if end is None else text[begin:end]


def closing_brace(text: str, begin: int) -> int | None:
    """Return the place of the brace that closes the one before `begin`, None where nothing closes it."""
    depth = 1
    for match in _ESCAPED_OR_BRACE.finditer(text, begin):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return match.start()
    return None


def extract_answer(response: str, answer_format: AnswerFormat = "boxed") -> ExtractedAnswer | None:
    """Return the final answer of a response by the rule of this module; None when there is none."""
    text = visible_text(response)
    if _BOX.search(text):
        return _answer(last_boxed(text), "box")
    if answer_format == "boxed":
        return None
    said = _said_last(text)
    candidates: list[tuple[str | None, AnswerSource]] = [
        (_last_tagged(text), "tag"),
        (text.rpartition("####")[2].partition("\n")[0] if "####" in text else None, "hashes"),
        (said, "phrase") if said is not None else (_last_line(text), "line"),
    ]
    found = (_answer(candidate, source) for candidate, source in candidates)
    return next((answer for answer in found if answer is not None), None)


def trim(answer: str) -> str:
    r"""Return the text without surrounding space and without the full stop or comma that ends a sentence.

    The dot of `\right.` and the comma of `\,` stay.
    """
    text = answer.strip()
    kept = text.rstrip(_PUNCTUATION)
    return text[: len(kept) + 1].rstrip() if kept.endswith(("\\", "\\right")) else kept


def _answer(text: str | None, source: AnswerSource) -> ExtractedAnswer | None:
    trimmed = trim(text) if text is not None else ""
    return ExtractedAnswer(trimmed, source) if trimmed else None


def _last_tagged(text: str) -> str | None:
    """Return the text between the last closed pair of answer tags."""
    begin, found = None, None
    for tag in _TAG.finditer(text):
        if not tag[1]:
            begin = tag.end()
        elif begin is not None:
            begin, found = None, (begin, tag.start())
    return text[slice(*found)] if found else None


def _said_last(text: str) -> str | None:
    """Return what the sentence with the last "answer is" or "answer:" gives, "" for "is not"; None without one."""
    begin = max((match.end() for match in _PHRASE.finditer(text)), default=-1)
    if begin < 0 or not text[begin:].partition("\n")[0].strip():
        return None
    if _DENIAL.match(text, begin):
        return ""
    formula = _FORMULA.match(text, begin)
    return formula[1] if formula else text[begin : _end_of_clause(text, begin)]


def _end_of_clause(text: str, begin: int) -> int:
    depth = 0
    for mark in _BRACKET_OR_PAUSE.finditer(text, begin):
        if mark[0] == "\n" or (depth <= 0 and mark[0] in ",.;"):
            return mark.start()
        depth += (mark[0] in "{([") - (mark[0] in "})]")
    return len(text)


def _last_line(text: str) -> str | None:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else None
