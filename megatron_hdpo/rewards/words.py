r"""Answers that are words: `\text{Evelyn}`, `ABCD`, `\text{H, E}`. They are compared as text, without case.

A parser would take them for products of letters, so that `ABCD` equals `CBAD` and `Evelyn` every anagram of it. A gold
answer is words when it has letters only (digits may follow them) and holds `\text{}`, two capital letters in a row or a
word of four letters that is no name of mathematics. `xy` and `abc` are products.
"""

from __future__ import annotations

import re

_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_SEPARATOR = re.compile(r"\s*[,;]\s*(?:(?:and|or)\s+)?|\s+(?:and|or)\s+")
_PART = re.compile(r"\(?\s*([A-Za-z](?:[A-Za-z0-9' .]|-(?=[A-Za-z]))*)\s*\)?\.?")
_WORD = re.compile(r"[A-Z]{2,}|[A-Za-z]{4,}")
_MATHEMATICS = re.compile(
    r"\b(?:pi|theta|alpha|beta|gamma|delta|lambda|omega|sigma|infinity|infty|sqrt|sin|cos|tan|cot|sec|csc|arcsin|arccos|"
    r"arctan|sinh|cosh|tanh|log|exp|frac)\b"
)


def is_words(text: str) -> bool:
    """Return whether a gold answer is to be compared as words."""
    plain = _TEXT.sub(r"\1", text)
    if words_of(text) is None or _MATHEMATICS.search(plain):
        return False
    return _TEXT.search(text) is not None or _WORD.search(plain) is not None


def words_of(text: str) -> tuple[str, ...] | None:
    """Return the words of a text in lower case, those of a list sorted; None for a text with anything else in it."""
    parts = [_PART.fullmatch(part) for part in _SEPARATOR.split(_TEXT.sub(r"\1", text).strip(" ."))]
    if not all(parts):
        return None
    return tuple(sorted(" ".join(part[1].replace(".", "").casefold().split()) for part in parts if part))
