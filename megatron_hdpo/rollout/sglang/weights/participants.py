"""The servers that take part in a weight update: asked together, and out of it at the first failure."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from megatron_hdpo.rollout.sglang.api import ApiError
from megatron_hdpo.rollout.sglang.replica import Replica
from megatron_hdpo.rollout.sglang.watch import Watch


class Participants:
    """replicas: those left. One that fails is half-updated: it is taken out of the engine, and started anew if it is
    ours.
    """

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

    async def attempt(self, step: Awaitable[None]) -> None:
        """Await a step that all take together. Where it breaks (no room on the disk, no process group) they are all
        set aside, and this rank goes on with the stream, in which other ranks take part.
        """
        try:
            await step
        except (OSError, RuntimeError) as error:
            self.set_all_aside(f"the update broke off: {type(error).__name__}: {error}")

    async def drop(self, replica: Replica, reason: str) -> None:
        """This replica has failed."""
        self.set_aside(replica, reason)
        await self._watch.lose(replica, reason)

    def set_aside(self, replica: Replica, reason: str) -> None:
        """This replica is well, but what it has of the new weights is no use, nor what it goes on to sample."""
        self.replicas.remove(replica)
        replica.half_updated = True
        replica.take_out(reason, "stale")

    def set_all_aside(self, reason: str) -> None:
        """None of them is of use."""
        for replica in list(self.replicas):
            self.set_aside(replica, reason)
