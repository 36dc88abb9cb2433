r"""What stands around an answer and is no part of it: formula marks, bold, sizes of letters, braces, final punctuation.

`$5$`, `\(5\)`, `**5**`, `\boldsymbol{5}`, `\large 5`, `{5}`, `5.` and `5\\` are all 5.
"""

from __future__ import annotations

import re

from megatron_hdpo.rewards.extraction import closing_brace, trim

_FORMULA = (re.compile(r"\\\((.*)\\\)", re.DOTALL), re.compile(r"\\\[(.*)\\\]", re.DOTALL))
_BOLD = re.compile(r"\*\*(.+)\*\*", re.DOTALL)
_COMMAND = re.compile(
    r"(?:\\(?:math(?:bf|it|rm|sf|tt)|boldsymbol|bm|pmb|textcolor\s*\{\w+\}|color\s*\{\w+\}|underline|ensuremath))?\s*\{"
)
_SIZE = re.compile(
    r"\\(?:(?:display|text|script)style|tiny|scriptsize|footnotesize|small|normalsize|[lL]arge|LARGE|[hH]uge|"
    r"rm|bf|it|sf)(?![A-Za-z])"
)
_TEXT = re.compile(r"\\text(?:bf|it|rm|sf|tt|normal)?\s*\{")
_NAMED_NUMBER = re.compile(r"[A-Za-z]\s*=\s*(-?\d+(?:\.\d+)?)")
_DOLLAR_AT_THE_END = re.compile(r"(?<!\\)(?:\\\\)*\\\$+\Z")
_LINE_BREAK = re.compile(r"\\\\[.,;:\s]*\Z")
_MARKS = 4
"""Marks within marks that are taken away: `**$5$**` has two."""


def bare(answer: str) -> str:
    """Return an answer without what stands around the whole of it, in a time proportional to its length."""
    text = trim(answer)
    for _ in range(_MARKS):
        before = text
        text = _without_commands(_without_marks(text))
        text = trim(_DOLLAR_AT_THE_END.sub("", _LINE_BREAK.sub("", text)).strip("$"))
        if text == before:
            break
    return text


def plain(answer: str) -> str:
    r"""Return a bare answer without `\text{}` around the whole, and a number without its name: 6 for `$x = 6$`."""
    text = bare(answer)
    for _ in range(_MARKS):
        found = _TEXT.match(text)
        if found is None or closing_brace(text, found.end()) != len(text) - 1:
            break
        text = bare(text[found.end() : -1])
    named = _NAMED_NUMBER.fullmatch(text)
    return named[1] if named else text


def _without_marks(text: str) -> str:
    for pattern in (*_FORMULA, _BOLD):
        if found := pattern.fullmatch(text):
            text = found[1].strip()
    return text


def _without_commands(text: str) -> str:
    """Return the text without a size before it, and without braces, or a command with braces, around the whole."""
    if found := _SIZE.match(text):
        text = text[found.end() :].lstrip()
    found = _COMMAND.match(text)
    if found is None or closing_brace(text, found.end()) != len(text) - 1:
        return text
    return text[found.end() : -1].strip() or text
