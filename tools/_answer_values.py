r"""Values of answers by arithmetic of its own, independent of the parsers that a judge uses.

It reads little: numbers, fractions, roots, powers, sums and products of letters, and tuples, lists, sets, intervals,
unions, matrices and equations of these. Letters get numbers. It serves to prove that two answers differ: what it does
not read has no value, and nothing is said about it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from string import ascii_letters

from mpmath import mp, mpf

_TOKEN = re.compile(r"\d+(?:\.\d+)?|\.\d+|\\[A-Za-z]+|\S")
_SPACES = re.compile(r"(?<!\\)\\[,;:! ]|~|\\(?:left|right)(?![A-Za-z])|\\\$|\$")
_UNIT = re.compile(r"\s*\\text\{[^{}]*\}(?:\^\{?\d\}?)?\s*\Z|\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ)\s*\Z")
_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_WORD = re.compile(r"(?<![\\A-Za-z])(?:[A-Za-z]{3,}|pi)|\d[eE][+-]")
_MIXED = re.compile(r"(-?)(\d+)\s*(?:\\[dt]?frac\{(\d+)\}\{(\d+)\}|\s(\d+)/(\d+))")
_MATRIX = re.compile(r"\\begin\{([pb]matrix)\}(.*)\\end\{\1\}", re.DOTALL)
_CLOSING = {"(": ")", "{": "}", "[": "]"}
_FRACTIONS = ("\\frac", "\\dfrac", "\\tfrac")
_LETTERS = tuple({letter: mpf(p + ord(letter) ** 2 % 97) / q for letter in ascii_letters} for p, q in ((3, 7), (5, 11)))
"""Two assignments of numbers to letters."""
_LARGEST_POWER = 5000
_DIGITS = 60
_EXACT, _DECIMAL = mpf("1e-40"), mpf("1e-5")
"""Relative differences from which on exact numbers, and numbers with a decimal among them, are surely different."""


@dataclass(frozen=True)
class Value:
    """A value that was read.

    kind: number, list (also a set), tuple, interval, union, matrix or equation. parts: of a number, its values under
    each assignment of letters; else the parts. ends: the brackets of an interval. decimal: written with a point.
    alternatives: factors under which a number also counts (1/100 for a percentage).
    """

    kind: str
    parts: tuple[object, ...]
    ends: str = ""
    decimal: bool = False
    alternatives: tuple[object, ...] = (1,)


def value_of(text: str) -> Value | None:
    """Return the value of a text, None where this module does not read it."""
    with mp.workdps(_DIGITS):
        try:
            return _read(_SPACES.sub(" ", text).strip())
        except (ValueError, IndexError, KeyError, ZeroDivisionError, OverflowError, RecursionError):
            return None


def surely_different(a: Value | None, b: Value | None) -> bool:
    """Return whether both values are known, of the same kind, and different."""
    if a is None or b is None or a.kind != b.kind:
        return False
    with mp.workdps(_DIGITS):
        return _different(a, b)


def is_number(text: str) -> bool:
    """Return whether a text is read as one number or expression."""
    value = value_of(text)
    return value is not None and value.kind == "number"


def split(text: str, separator: str = ",") -> list[str]:
    """Return the parts of a text between separators that stand outside of brackets."""
    parts, depth, begin = [], 0, 0
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == separator and depth == 0:
            parts.append(text[begin:place].strip())
            begin = place + 1
    return [*parts, text[begin:].strip()]


def _read(text: str) -> Value:
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    if found := _MATRIX.fullmatch(text):
        rows = [row.split("&") for row in re.split(r"\\\\", found[2].strip().removesuffix("\\\\"))]
        return Value("matrix", tuple(tuple(_read(cell.strip()) for cell in row) for row in rows))
    if "\\cup" in text:
        return Value("union", tuple(_read(part.strip()) for part in text.split("\\cup")))
    if text.startswith("\\{") and text.endswith("\\}"):
        return Value("list", tuple(map(_read, split(text[2:-2]))))
    if re.fullmatch(r"[(\[].*[)\]]", text) and len(inner := split(text[1:-1])) > 1:
        return _bracketed(text, inner)
    if len(parts := split(text)) > 1:
        return Value("list", tuple(map(_read, parts)))
    if len(sides := split(text, "=")) == 2:
        return Value("equation", tuple(map(_read, sides)))
    return _number(text)


def _bracketed(text: str, inner: Sequence[str]) -> Value:
    parts = tuple(map(_read, inner))
    if len(parts) == 2 and ("[" in text[0] or "]" in text[-1] or "\\infty" in text):
        return Value("interval", parts, ends=text[0] + text[-1])
    if text[0] + text[-1] != "()":
        raise ValueError(text)
    return Value("tuple", parts)


def _number(text: str) -> Value:
    is_percentage = text.endswith("\\%")
    text = _UNIT.sub("", text.removesuffix("\\%").strip())
    if _WORD.search(text):
        raise ValueError("a word, a product of letters, or e-notation")
    if found := _MIXED.fullmatch(text):
        above, below = found[3] or found[5], found[4] or found[6]
        text = f"{found[1]}({found[2]}+\\frac{{{above}}}{{{below}}})"
    values = tuple(_Reader(text, letters).value() for letters in _LETTERS)
    return Value("number", values, decimal="." in text, alternatives=(1, mpf("0.01")) if is_percentage else (1,))


class _Reader:
    """Reader of one expression; letters are the numbers of an assignment. Raises ValueError, IndexError, KeyError."""

    def __init__(self, text: str, letters: dict[str, object]) -> None:
        self._tokens = _TOKEN.findall(text)[::-1]
        self._letters = letters

    def value(self) -> object:
        found = self._sum()
        if self._tokens:
            raise ValueError(self._tokens)
        return found

    def _peek(self) -> str:
        return self._tokens[-1] if self._tokens else ""

    def _take(self, *wanted: str) -> bool:
        if self._peek() in wanted:
            self._tokens.pop()
            return True
        return False

    def _sum(self) -> object:
        total = -self._product() if self._take("-") else (self._take("+"), self._product())[1]
        while self._peek() in ("+", "-"):
            minus = self._tokens.pop() == "-"
            total = total - self._product() if minus else total + self._product()
        return total

    def _product(self) -> object:
        is_whole = self._peek().isdigit()
        total = self._power()
        while token := self._peek():
            if is_whole and token in _FRACTIONS:
                raise ValueError("a mixed number, or a product")
            is_whole = False
            if self._take("*", "\\cdot", "\\times"):
                total = total * self._power()
            elif self._take("/", "\\div"):
                total = total / self._power()
            elif token[0].isdigit() or token in ("+", "-", ")", "}", "]", ",", "=", "|", "!", "_", "^"):
                break
            else:
                total = total * self._power()
        return total

    def _power(self) -> object:
        base = self._base()
        if not self._take("^"):
            return base
        exponent = self._argument()
        if abs(exponent) > _LARGEST_POWER:
            raise ValueError("a large power")
        return mp.power(base, exponent)

    def _argument(self) -> object:
        """Read a group in braces, or one digit, letter or command."""
        if self._peek()[0].isdigit() and len(self._peek()) > 1:
            raise ValueError("\\frac12 and 2^10 are read in different ways")
        return -self._base() if self._take("-") else self._base()

    def _base(self) -> object:
        token = self._tokens.pop()
        if token in _CLOSING:
            found = self._sum()
            if self._tokens.pop() != _CLOSING[token]:
                raise ValueError(token)
            return found
        if token in _FRACTIONS:
            above = self._argument()
            return above / self._argument()
        if token == "\\sqrt":
            degree = self._base() if self._peek() == "[" else 2
            return mp.root(self._argument(), degree) if degree != 2 else mp.sqrt(self._argument())
        if token[0].isdigit() or token[0] == ".":
            return mpf(token)
        if token in ("\\pi", "\\infty"):
            return mp.pi if token == "\\pi" else mp.inf
        return mp.e if token == "e" else mp.j if token == "i" else self._letters[token]


def _different(a: Value, b: Value) -> bool:
    if a.kind == "number":
        pairs = product(a.alternatives, b.alternatives)
        return all(_numbers_differ(a, b, x, y) for x, y in pairs)
    if a.kind == "matrix":
        if [len(row) for row in a.parts] != [len(row) for row in b.parts]:
            return True
        cells = zip((cell for row in a.parts for cell in row), (cell for row in b.parts for cell in row), strict=True)
        return any(surely_different(x, y) for x, y in cells)
    if a.kind == "equation":
        return _equations_differ(a, b)
    if a.kind in ("tuple", "interval"):
        parts = zip(a.parts, b.parts, strict=False)
        return len(a.parts) != len(b.parts) or a.ends != b.ends or any(surely_different(x, y) for x, y in parts)
    return _collections_differ(a, b) or _collections_differ(b, a)


def _numbers_differ(a: Value, b: Value, factor_a: object, factor_b: object) -> bool:
    bound = _DECIMAL if a.decimal or b.decimal else _EXACT
    for x, y in zip(a.parts, b.parts, strict=True):
        x, y = x * factor_a, y * factor_b
        if mp.isinf(x) or mp.isinf(y):
            if x != y:
                return True
        elif abs(x - y) > bound * max(abs(x), abs(y)):
            return True
    return False


def _collections_differ(a: Value, b: Value) -> bool:
    """Return whether a part of `a` differs from all parts of `b`."""
    return any(all(surely_different(x, y) for y in b.parts) for x in a.parts)


def _equations_differ(a: Value, b: Value) -> bool:
    """Return whether the differences of the sides are no multiples of each other."""
    (one, two), (three, four) = ([x - y for x, y in zip(*(s.parts for s in e.parts), strict=True)] for e in (a, b))
    return abs(one * four - two * three) > _DECIMAL * abs(one * four)
