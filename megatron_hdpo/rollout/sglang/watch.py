"""Looks after the replicas of an engine: takes out what is dead or hung, restarts what is ours, lets back in what is
whole."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from megatron_hdpo.rollout.sglang.api import ApiError
from megatron_hdpo.rollout.sglang.replica import Replica
from megatron_hdpo.rollout.sglang.server import ServerError

if TYPE_CHECKING:
    from megatron_hdpo.rollout.sglang.engine import SGLangEngine

LOGGER = logging.getLogger(__name__)


class Watch:
    """`paused`: during a weight update servers are busy with it and show no health."""

    def __init__(self, engine: SGLangEngine) -> None:
        self.engine = engine
        self.paused = False
        self._restarting: set[int] = set()

    async def run(self, replica: Replica) -> None:
        """Look at a replica again and again, for ever."""
        well = time.monotonic()
        while True:
            await asyncio.sleep(self.engine.config.health_interval_s)
            if self.paused or replica.index in self._restarting:
                well = time.monotonic()
                continue
            if replica.state == "down":
                await self._let_back(replica)
            elif self._dead(replica):
                await self.lose(replica, "its process has ended")
            elif await self._healthy(replica):
                well = time.monotonic()
            elif time.monotonic() - well > self.engine.config.health_timeout_s:
                await self.lose(replica, f"no sign of health for {time.monotonic() - well:.0f} s")

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
        if replica.own is not None:
            self._restarting.add(replica.index)
            self._task = asyncio.get_running_loop().create_task(self._restart(replica))

    async def wait_for_restarts(self) -> None:
        """Until no server is being started anew."""
        while self._restarting:
            await asyncio.sleep(0.1)

    async def _restart(self, replica: Replica) -> None:
        servers = self.engine.servers
        assert servers is not None and replica.own is not None
        try:
            await asyncio.to_thread(servers.restart, replica.own)
            await self._let_back(replica)
        except ServerError as error:
            replica.reason = str(error)
            LOGGER.error("%s", error)
        finally:
            self._restarting.discard(replica.index)

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
        try:
            await replica.api.get("/health", self.engine.config.health_timeout_s)
        except ApiError:
            return False
        return True
