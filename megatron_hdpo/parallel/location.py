"""Location of a rank: its node, and its number among the node's ranks."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class RankLocation:
    """Location of a rank.

    local_rank: its number on its node. host: name of the node. leads: whether it leads its data-parallel replica (and
    so receives whole tensors when only leaders do).
    """

    rank: int
    local_rank: int
    host: str = ""
    leads: bool = True

    @property
    def node(self) -> int:
        """Return the first rank of this rank's node (torchrun agent)."""
        return self.rank - self.local_rank

    def __str__(self) -> str:
        return f"{self.host}:{self.rank}"


def locate_rank(rank: int, leads: bool, environment: Mapping[str, str] = os.environ) -> RankLocation:
    """Return the location of this process, from torchrun's variables; without them it is alone on its node."""
    return RankLocation(
        rank=rank,
        local_rank=int(environment.get("LOCAL_RANK", "0")),
        host=socket.gethostname(),
        leads=leads,
    )
