"""Looks after the replicas of an engine: takes out what is dead or hung, restarts what is ours, lets back in what is
whole.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from megatron_hdpo.rollout.sglang.api import ApiError
from megatron_hdpo.rollout.sglang.replica import Replica
from megatron_hdpo.rollout.sglang.servers.server import ServerError

if TYPE_CHECKING:
    from megatron_hdpo.rollout.sglang.engine import SGLangEngine

LOGGER = logging.getLogger(__name__)


class Watch:
    """`paused`: during a weight update servers are busy with it and show no health."""

    def __init__(self, engine: SGLangEngine) -> None:
        self.engine = engine
        self.paused = False
        self._restarting: dict[int, asyncio.Task[None]] = {}

    async def run(self, replica: Replica) -> None:
        """Look at a replica again and again, for ever."""
        well = time.monotonic()
        while True:
            await asyncio.sleep(self.engine.config.health_interval_s)
            try:
                well = await self._see_to(replica, well)
            except Exception:
                # Whatever a server answers, it is looked at again.
                LOGGER.exception("SGLang server %s could not be looked at", replica.url)

    async def _see_to(self, replica: Replica, well: float) -> float:
        """One look; returns the time when the replica was last known to be well."""
        if self.paused or replica.index in self._restarting:
            return time.monotonic()
        if replica.state == "down":
            await (self._let_back(replica) if not self._dead(replica) else self._start_anew(replica))
        elif self._dead(replica):
            await self.lose(replica, "its process has ended")
        elif await self._healthy(replica) or self.paused:
            return time.monotonic()
        elif time.monotonic() - well > self.engine.config.health_timeout_s:
            await self.lose(replica, f"no sign of health for {time.monotonic() - well:.0f} s")
        return well

    async def look(self, replica: Replica) -> None:
        """A request got no answer: is the server still there?"""
        if replica.state == "down" or replica.index in self._restarting:
            return
        if self._dead(replica):
            await self.lose(replica, "its process has ended")
        elif not await replica.api.alive():
            await self.lose(replica, "it does not answer")

    async def lose(self, replica: Replica, reason: str) -> None:
        """Take a replica out; a server of ours is started anew, in the background."""
        if replica.state == "down":
            return
        LOGGER.warning("SGLang server %s is taken out: %s", replica.url, reason)
        replica.take_out(reason)
        await self._start_anew(replica)

    async def _start_anew(self, replica: Replica) -> None:
        """In the background, where the server is ours and has restarts left."""
        servers = self.engine.servers
        if servers is None or replica.own is None or servers.exhausted(replica.own):
            return
        self._restarting[replica.index] = asyncio.get_running_loop().create_task(self._restart(replica))

    async def wait_for_servers(self) -> None:
        """Until no server is being started anew and one at least answers; a given one may be away for a moment, and
        gets as long to come back as one that shows no health.
        """
        replicas, deadline = self.engine.replicas, time.monotonic() + self.engine.config.health_timeout_s
        may_return = any(replica.own is None for replica in replicas)
        while self._restarting or (
            may_return and all(replica.state == "down" for replica in replicas) and time.monotonic() < deadline
        ):
            await asyncio.sleep(0.1)

    async def _restart(self, replica: Replica) -> None:
        servers = self.engine.servers
        assert servers is not None and replica.own is not None
        try:
            await asyncio.to_thread(servers.restart, replica.own)
            replica.asleep = False
            await self._let_back(replica)
        except (ServerError, OSError, ValueError) as error:
            replica.reason = str(error)
            LOGGER.error("%s", error)
        finally:
            self._restarting.pop(replica.index, None)

    async def _let_back(self, replica: Replica) -> None:
        """A server that answers again: it serves if it has the run's weights still, else from the next update on."""
        servers = self.engine.servers
        if servers is not None and replica.own is not None:
            replica.api.url = replica.ask.url = servers.processes[replica.own].url
        try:
            replica.info = await replica.api.info()
            version = (await replica.api.get("/model_info", 10)).get("weight_version")
        except ApiError as error:
            replica.reason = str(error)
            return
        current = version == str(self.engine.weight_version) and not replica.half_updated
        replica.state, replica.reason = ("serving", "") if current else ("stale", "it was restarted")
        LOGGER.warning("SGLang server %s is back, %s", replica.url, replica.state)

    def _dead(self, replica: Replica) -> bool:
        servers = self.engine.servers
        return servers is not None and replica.own is not None and not servers.processes[replica.own].alive()

    async def _healthy(self, replica: Replica) -> bool:
        async with replica.looked_at:
            if replica.asleep:
                return await replica.api.alive()
            try:
                await replica.api.get("/health", self.engine.config.health_timeout_s)
            except ApiError:
                return False
            return True
