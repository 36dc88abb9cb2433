r"""Bound on the size of the numbers in an answer, found before anything evaluates it.

SymPy computes `9^{9^{9}}` or `100000000!` when it parses them, for hours. The text is read once: numbers, groups in
brackets, powers, factorials and binomials. Everything else counts as 1, and a group as the product of its parts.
"""

from __future__ import annotations

import math
import re

MOST_DIGITS = 10_000.0
"""Digits of the largest number that an answer may hold."""
LARGEST_EXPONENT = 10_000.0
MOST_CHARACTERS = 20_000
DEEPEST = 100
"""Brackets within brackets, and powers within exponents."""

_TOKEN = re.compile(r"\d[\d,]*(?:\.\d+)?|\\[dt]?binom|\\[a-zA-Z]+|\*\*|\S")
_OPENING, _CLOSING = "{([", "})]"


class TooLargeError(ValueError):
    """An answer that nobody can evaluate."""


def check_size(text: str) -> None:
    """Raise TooLargeError, in a time proportional to its length, for an answer that takes too long to evaluate."""
    if len(text) > MOST_CHARACTERS:
        raise TooLargeError(f"an answer of {len(text)} characters")
    reader = _Reader(_TOKEN.findall(text))
    while reader.left:  # a closing bracket too many ends a group
        reader.group(0)


class _Reader:
    """Reader of tokens. Its methods return the decimal digits of what they read, a bound from above; 0 for 1."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens[::-1]

    @property
    def left(self) -> bool:
        return bool(self._tokens)

    def group(self, depth: int) -> float:
        """Read up to the closing bracket."""
        if depth > DEEPEST:
            raise TooLargeError(f"brackets or powers nested more than {DEEPEST} deep")
        total = 0.0
        while self._tokens:
            if self._tokens[-1] in _CLOSING:
                self._tokens.pop()
                break
            total = _limited(total + self._power(depth))
        return total

    def _power(self, depth: int) -> float:
        """Read a value with its factorials, and the powers of it; `a^b^c` is `a^(b^c)`."""
        if depth > DEEPEST:
            raise TooLargeError(f"brackets or powers nested more than {DEEPEST} deep")
        digits = self._value(depth)
        while self._next_is("!"):
            digits = _limited(_bounded_value(digits) * digits)
        if self._next_is("^", "**") and self._tokens:
            digits = _limited(digits * _bounded_value(self._power(depth + 1)))
        return digits

    def _value(self, depth: int) -> float:
        token = self._tokens.pop()
        if token in _OPENING:
            return self.group(depth + 1)
        if token.endswith("binom"):
            size = self._power(depth + 1) if self._tokens else 0.0
            if self._tokens:
                self._power(depth + 1)
            return _limited(_bounded_value(size) * math.log10(2))
        return _digits(token) if token[0].isdigit() else 0.0

    def _next_is(self, *tokens: str) -> bool:
        if self._tokens and self._tokens[-1] in tokens:
            self._tokens.pop()
            return True
        return False


def _digits(number: str) -> float:
    whole = number.partition(".")[0].replace(",", "").lstrip("0")
    return float(len(whole)) if len(whole) > 15 else math.log10(max(1, int(whole or 0)))


def _limited(digits: float) -> float:
    if digits > MOST_DIGITS:
        raise TooLargeError(f"a number of more than {MOST_DIGITS:.0f} digits")
    return digits


def _bounded_value(digits: float) -> float:
    """Return an exponent, or the argument of a factorial or a binomial, from its digits."""
    if digits > math.log10(LARGEST_EXPONENT):
        raise TooLargeError(f"an exponent or the argument of a factorial beyond {LARGEST_EXPONENT:.0f}")
    return float(10**digits)
