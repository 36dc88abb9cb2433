"""State of one server in the engine: address, properties, whether it may be used, and its requests."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_hdpo.rollout.sglang.api import ServerApi, ServerInfo
from megatron_hdpo.types.breaker import Breaker

State = Literal["stale", "serving", "down"]
MOST_NAMED = 4
"""Servers that one message names: of hundreds, the first few say what is wrong."""


@dataclass(eq=False)
class Replica:
    """One server.

    state: `serving` has the current weights; `stale` answers but has other weights; `down` does not answer. ask: client
    for samples: the server itself, or the router in front of it. own: index among the servers that this process
    started, None for a given one. taken: slots that samples hold. in_flight: running sample requests. abandoned: ids of
    requests that were given up while it did not answer, to be aborted when it returns. half_updated: a weight update of
    it did not complete. stamped: it has been sent weights of this run. foreign: weights that another run has sent since
    were found on it, so it is left alone. asleep: GPU memory is released to the trainer; do not call /health, it would
    generate and crash. health_lock: held during a health check.
    """

    index: int
    api: ServerApi
    ask: ServerApi
    info: ServerInfo
    own: int | None = None
    state: State = "stale"
    breaker: Breaker = field(default_factory=Breaker)
    taken: int = 0
    in_flight: set[asyncio.Task[Any]] = field(default_factory=set)
    abandoned: set[str] = field(default_factory=set)
    reason: str = "no weights yet"
    half_updated: bool = False
    stamped: bool = False
    foreign: bool = False
    asleep: bool = False
    health_lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def split(self) -> tuple[int, int]:
        """Return over how many ranks its weights are split, and over how many groups of them its experts."""
        return self.info.tensor_parallel, self.info.expert_parallel

    @property
    def url(self) -> str:
        """Address of the server."""
        return self.api.url

    def take_out(self, reason: str, state: State = "down") -> None:
        """Stop using the server and cancel its running requests, which are retried elsewhere.

        Call it in the engine's loop.
        """
        self.state, self.reason = state, reason
        for task in list(self.in_flight):
            task.cancel()


def first_few(texts: Sequence[str]) -> str:
    """Return what is said of each server as one text, of many servers that of the first few."""
    more = len(texts) - MOST_NAMED
    return "; ".join(texts[:MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")


def reasons(replicas: Sequence[Replica]) -> str:
    """Return why the servers are not used."""
    return first_few([f"{replica.url}: {replica.reason}" for replica in replicas])
