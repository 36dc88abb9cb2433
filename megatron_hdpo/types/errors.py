"""Error of input data that cannot be used."""

from __future__ import annotations


class DataError(ValueError):
    """Wrong input data. The message says what is wrong, where (file and line, or task) and what to do."""
