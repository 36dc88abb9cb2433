"""What the planner refuses."""

from __future__ import annotations


class PlanError(ValueError):
    """A plan that cannot be made: the trainer cannot run it, or a number is missing; the text says which."""
