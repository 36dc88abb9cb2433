"""Errors that the user can fix."""

from __future__ import annotations


class UserError(Exception):
    """Error that the user can fix: its message alone is printed, without a traceback.

    The message says what is wrong, where (file, line, recipe key, rank), and what to do.
    """


class DataError(UserError, ValueError):
    """Wrong input data. The message says what is wrong, where (file and line, or task) and what to do."""
