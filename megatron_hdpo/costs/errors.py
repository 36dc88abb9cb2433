"""Error of a plan."""

from __future__ import annotations


class PlanError(ValueError):
    """Plan that is not possible: the trainer cannot run it, or a number is missing. The message says which."""
