"""The one error for input data that cannot be used."""

from __future__ import annotations


class DataError(ValueError):
    """Input data that is wrong: says what, where (file and line, or task) and what to do about it."""
