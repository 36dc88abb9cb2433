"""Error of a plan."""

from __future__ import annotations

from megatron_hdpo.types.errors import UserError


class PlanError(UserError, ValueError):
    """Plan that is not possible: the trainer cannot run it, or a number is missing. The message says which."""
