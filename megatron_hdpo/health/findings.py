"""What a check hands over, and how ranks are named in it."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_NAMED = 8


class HealthError(RuntimeError):
    """Ranks or machines that are not fit to train together; one line per reason, with hosts and what to do."""


@dataclass
class Finding:
    """metrics: `health/...`. problems stop the run, warnings do not. The same on every rank."""

    metrics: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, other: Finding) -> None:
        """Take over what another check found."""
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
    """The place of this process."""
    return Place(rank, socket.gethostname(), rank - int(environment.get("LOCAL_RANK", "0")))


def named(places: Sequence[Place]) -> str:
    """`node3:24, node3:25`: hosts and ranks, at most eight of them."""
    more = f" and {len(places) - _NAMED} more" if len(places) > _NAMED else ""
    return ", ".join(map(str, places[:_NAMED])) + more
