"""Results of the health checks, and how they name ranks."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_NAMED = 8


class HealthError(RuntimeError):
    """Ranks or machines are not fit to train together.

    The message has one line per reason, with hosts and what to do.
    """


@dataclass
class Finding:
    """Result of a check, the same on every rank.

    metrics: `health/...`. problems: reasons not to start the run. warnings: shown, but the run starts.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, other: Finding) -> None:
        """Merge the result of another check into this one."""
        self.metrics |= other.metrics
        self.problems += other.problems
        self.warnings += other.warnings


@dataclass(frozen=True)
class Place:
    """Where a rank is. node: the first rank of its torchrun agent."""

    rank: int
    host: str
    node: int

    def __str__(self) -> str:
        return f"{self.host}:{self.rank}"


def place_here(rank: int, environment: Mapping[str, str] = os.environ) -> Place:
    """Return the location of this process."""
    return Place(rank, socket.gethostname(), rank - int(environment.get("LOCAL_RANK", "0")))


def named(places: Sequence[Place]) -> str:
    """Return hosts and ranks as text, such as `node3:24, node3:25`; at most eight of them."""
    more = f" and {len(places) - _NAMED} more" if len(places) > _NAMED else ""
    return ", ".join(map(str, places[:_NAMED])) + more
