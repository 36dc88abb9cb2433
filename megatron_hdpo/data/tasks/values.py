"""Values of rows as text: numbers as the plain decimals that stand in the file, and what is no text is refused."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

_LONGEST_EXPONENT = 400
"""Largest power of ten that is written out, more than a float has: digits beyond that are no final answer."""
_NO_VALUES = frozenset(
    ["nan", "NaN", "-nan", "NAN", "NaT", "<NA>", "None", "null", "NULL", "inf", "-inf", "+inf", "Infinity", "-Infinity"]
)
"""Texts that pandas, numpy, Python and JavaScript write for a value that is missing, or that is no finite number."""


class NoText(ValueError):
    """A value that is neither a text nor a finite number; the message says what it is."""


class WrittenFloat(float):
    """Float that remembers how the file wrote it, as 0.1 and 1e-05 are no floats exactly. Equal to the float itself."""

    written: str

    def __new__(cls, written: str) -> WrittenFloat:
        number = super().__new__(cls, written)
        number.written = written
        return number


def as_text(value: Any) -> str:
    """Return a text as it is, and a number as a plain decimal: 0.00001, never 1e-05, of which judges make 1*e - 05.

    Raises NoText for everything else: a list, an object, NaN, infinity, true, bytes.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise NoText(f"{type(value).__name__}, not text or a number")
    number = _decimal(value)
    if not number.is_finite():
        raise NoText(f"{value}, not a finite number")
    if number and abs(number.adjusted()) > _LONGEST_EXPONENT:
        raise NoText(f"a number of {abs(number.adjusted()):,} digits, not a final answer")
    return format(number, "f")


def _decimal(number: int | float | Decimal) -> Decimal:
    if isinstance(number, WrittenFloat):
        return Decimal(number.written)
    # The shortest decimal that is this float: of 0.1 it is 0.1, and not the 55 digits of its exact value.
    return Decimal(float.__repr__(number) if isinstance(number, float) else number)


def is_missing(value: Any) -> bool:
    """Return whether a value is null, or the NaN that pandas writes for null."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def stands_for_missing(text: str) -> bool:
    """Return whether a text is what a program writes for a missing or infinite value: nan, None, inf."""
    return text.strip() in _NO_VALUES
