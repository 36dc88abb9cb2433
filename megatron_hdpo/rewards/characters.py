r"""Characters outside ASCII as the LaTeX that means the same: `π` is `\pi`, `x²` is `x^{2}`, `½` is `\frac{1}{2}`.

Digits of every script are digits, every dash is a minus sign, every space a space; invisible characters are dropped. A
character without a rule stays as it is.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from functools import lru_cache

_LATEX: Mapping[str, str] = {
    "\N{MINUS SIGN}": "-",
    "\N{INFINITY}": r"\infty ",
    "\N{MULTIPLICATION SIGN}": r"\times ",
    "\N{DIVISION SIGN}": r"\div ",
    "\N{MIDDLE DOT}": r"\cdot ",
    "\N{DOT OPERATOR}": r"\cdot ",
    "\N{PLUS-MINUS SIGN}": r"\pm ",
    "\N{LESS-THAN OR EQUAL TO}": r"\leq ",
    "\N{GREATER-THAN OR EQUAL TO}": r"\geq ",
    "\N{NOT EQUAL TO}": r"\neq ",
    "\N{ALMOST EQUAL TO}": r"\approx ",
    "\N{UNION}": r"\cup ",
    "\N{INTERSECTION}": r"\cap ",
    "\N{ELEMENT OF}": r"\in ",
    "\N{EMPTY SET}": r"\emptyset ",
    "\N{DEGREE SIGN}": r"^\circ ",
    "\N{GREEK SMALL LETTER LAMDA}": r"\lambda ",
    "\N{HORIZONTAL ELLIPSIS}": r"\ldots ",
    "\N{FRACTION SLASH}": "/",
    "\N{DIVISION SLASH}": "/",
    "\N{RIGHT SINGLE QUOTATION MARK}": "'",
}
_OF_CATEGORY: Mapping[str, str] = {"Pd": "-", "Zs": " ", "Cf": "", "Sc": ""}
"""Dashes, spaces, invisible characters and currency signs, by Unicode category."""

_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎]+")
_ROOT = re.compile(r"√\s*(\d+(?:\.\d+)?|[A-Za-z])?")


def to_latex(text: str) -> str:
    """Return the text with every character that has an ASCII or LaTeX spelling in that spelling."""
    if text.isascii():
        return text
    text = _RAISED.sub(lambda run: "^{" + _compatible(run.group()) + "}", text)
    text = _LOWERED.sub(lambda run: "_{" + _compatible(run.group()) + "}", text)
    text = _ROOT.sub(lambda root: rf"\sqrt{{{root[1]}}}" if root[1] else r"\sqrt", text)
    return "".join(map(_latex, text))


@lru_cache(maxsize=4096)
def _latex(character: str) -> str:
    if character.isascii():
        return character
    if character in _LATEX:
        return _LATEX[character]
    digit = unicodedata.decimal(character, None)
    if digit is not None:
        return str(digit)
    form = unicodedata.decomposition(character)
    if form.startswith("<fraction>"):
        above, _, below = unicodedata.normalize("NFKC", character).partition("\N{FRACTION SLASH}")
        return rf"\frac{{{above}}}{{{below}}}"
    if form.startswith("<wide>"):
        return unicodedata.normalize("NFKC", character)
    greek = re.fullmatch(r"GREEK SMALL LETTER (\w+)", unicodedata.name(character, ""))
    return f"\\{greek[1].lower()} " if greek else _OF_CATEGORY.get(unicodedata.category(character), character)


def _compatible(run: str) -> str:
    return unicodedata.normalize("NFKC", run).replace("\N{MINUS SIGN}", "-")
