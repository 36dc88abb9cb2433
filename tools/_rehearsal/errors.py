"""Error of a rehearsal that its user can fix."""

from __future__ import annotations

from megatron_hdpo.types.errors import UserError


class RehearsalError(UserError, RuntimeError):
    """Something that a rehearsal needs is missing, or a rank did not get to its end; the text says what to do."""
