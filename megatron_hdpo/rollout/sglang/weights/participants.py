"""Servers that take part in a weight update: called together, and excluded at the first failure."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from megatron_hdpo.rollout.sglang.api import ApiError
from megatron_hdpo.rollout.sglang.replica import Replica
from megatron_hdpo.rollout.sglang.watch import Watch


class Participants:
    """Servers of one weight update.

    replicas: those still taking part. A server that fails is half-updated: it is taken out of the engine, and restarted
    if this process owns it.
    """

    def __init__(self, replicas: list[Replica], watch: Watch) -> None:
        self.replicas = list(replicas)
        self._watch = watch

    async def each(self, call: Callable[[Replica], Awaitable[object]]) -> None:
        """Await `call` of every replica in parallel; exclude the replicas whose call raises ApiError."""
        asked = list(self.replicas)
        results = await asyncio.gather(*(call(replica) for replica in asked), return_exceptions=True)
        for replica, result in zip(asked, results, strict=True):
            if isinstance(result, ApiError):
                await self.fail(replica, str(result))
            elif isinstance(result, BaseException):
                raise result

    async def attempt(self, step: Awaitable[None]) -> None:
        """Await a step that all servers take together.

        When it fails (disk full, no process group), all servers are excluded, and this rank continues to read the
        stream, because other ranks take part in it.
        """
        try:
            await step
        except (OSError, RuntimeError) as error:
            self.exclude_all(f"the update failed: {type(error).__name__}: {error}")

    async def fail(self, replica: Replica, reason: str) -> None:
        """Exclude a replica that failed, and mark it as down."""
        self.exclude(replica, reason)
        await self._watch.mark_down(replica, reason)

    def exclude(self, replica: Replica, reason: str) -> None:
        """Exclude a replica that is alive but has incomplete weights; its samples are discarded."""
        self.replicas.remove(replica)
        replica.half_updated = True
        replica.take_out(reason, "stale")

    def exclude_all(self, reason: str) -> None:
        """Exclude all replicas."""
        for replica in list(self.replicas):
            self.exclude(replica, reason)
