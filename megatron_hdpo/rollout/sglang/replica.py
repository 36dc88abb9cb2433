"""One server as the engine sees it: its address, what it can, whether it may be asked, and what it is busy with."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_hdpo.rollout.sglang.api import ServerApi, ServerInfo

State = Literal["stale", "serving", "down"]


@dataclass
class Replica:
    """state: `serving` has the weights of the present version; `stale` answers but has others; `down` does not answer.
    ask: where samples are asked for: the server itself, or the router before it. own: index among the servers that this
    process started, None for one that was given. in_flight: samples being asked of it. asleep: its memory is the
    trainer's; a look at its health would sample and end it. looked_at: held during such a look.
    """

    index: int
    api: ServerApi
    ask: ServerApi
    info: ServerInfo
    slots: asyncio.Semaphore
    own: int | None = None
    state: State = "stale"
    in_flight: set[asyncio.Task[Any]] = field(default_factory=set)
    reason: str = "no weights yet"
    half_updated: bool = False
    asleep: bool = False
    looked_at: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def url(self) -> str:
        """Its address."""
        return self.api.url

    def take_out(self, reason: str, state: State = "down") -> None:
        """It does not answer, or what it would is no use: nothing more is asked of it, and what was is asked elsewhere.
        In the engine's loop.
        """
        self.state, self.reason = state, reason
        for task in list(self.in_flight):
            task.cancel()
