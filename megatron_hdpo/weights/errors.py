"""The error class of this room, and the layout of its lists."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_hdpo.types.errors import UserError


class WeightsError(UserError, ValueError):
    """Weights that do not fit a model; the text lists every name and says what to do."""


def listed(title: str, lines: Iterable[str], limit: int = 20) -> list[str]:
    """Return `title` with its lines below it: the first `limit` and the count of the rest; [] if there are no lines."""
    lines = list(lines)
    if not lines:
        return []
    rest = [f"    ... and {len(lines) - limit} more"] if len(lines) > limit else []
    return [f"  {title} ({len(lines)}):", *(f"    {line}" for line in lines[:limit]), *rest]
