"""The servers that take part in a weight update: asked together, and out of it at the first failure."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from megatron_hdpo.rollout.sglang.api import ApiError
from megatron_hdpo.rollout.sglang.replica import Replica
from megatron_hdpo.rollout.sglang.watch import Watch


class Participants:
    """replicas: those left. One that fails is half-updated: it is taken out of the engine, and started anew if it is
    ours."""

    def __init__(self, replicas: list[Replica], watch: Watch) -> None:
        self.replicas = list(replicas)
        self._watch = watch

    async def each(self, call: Callable[[Replica], Awaitable[object]]) -> None:
        """Await `call` of every replica at once; those whose call raises ApiError are out."""
        asked = list(self.replicas)
        results = await asyncio.gather(*(call(replica) for replica in asked), return_exceptions=True)
        for replica, result in zip(asked, results, strict=True):
            if isinstance(result, ApiError):
                await self.drop(replica, str(result))
            elif isinstance(result, BaseException):
                raise result

    async def drop(self, replica: Replica, reason: str) -> None:
        """This replica has failed."""
        self.set_aside(replica, reason)
        await self._watch.lose(replica, reason)

    def set_aside(self, replica: Replica, reason: str) -> None:
        """This replica is well, but what it has of the new weights is no use."""
        self.replicas.remove(replica)
        replica.state, replica.reason, replica.half_updated = "stale", reason, True
