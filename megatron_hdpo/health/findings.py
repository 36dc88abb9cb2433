"""Results of the health checks, and how they name ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_hdpo.parallel.location import RankLocation
from megatron_hdpo.types.errors import UserError

_NAMED = 8


class HealthError(UserError, RuntimeError):
    """Ranks or machines are not fit to train together.

    The message has one line per reason, with hosts and what to do.
    """


@dataclass
class CheckResult:
    """Result of a check, the same on every rank.

    metrics: `health/...`. problems: reasons not to start the run. warnings: shown, but the run starts.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, other: CheckResult) -> None:
        """Merge the result of another check into this one."""
        self.metrics |= other.metrics
        self.problems += other.problems
        self.warnings += other.warnings


def named(locations: Sequence[RankLocation]) -> str:
    """Return hosts and ranks as text, such as `node3:24, node3:25`; at most eight of them."""
    more = f" and {len(locations) - _NAMED} more" if len(locations) > _NAMED else ""
    return ", ".join(map(str, locations[:_NAMED])) + more
