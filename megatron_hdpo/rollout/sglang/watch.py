"""Health checks of an engine's replicas: takes out dead or hung ones, restarts its own, readmits healthy ones."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from megatron_hdpo.rollout.sglang.api import ApiError
from megatron_hdpo.rollout.sglang.loop_clock import LoopClock
from megatron_hdpo.rollout.sglang.replica import Replica
from megatron_hdpo.rollout.sglang.servers.server import ServerError

if TYPE_CHECKING:
    from megatron_hdpo.rollout.sglang.engine import SGLangEngine

LOGGER = logging.getLogger(__name__)


class Watch:
    """Watches the replicas of an engine.

    paused: set during a weight update, when servers are busy and answer no health check. clock: of the engine's loop.
    """

    def __init__(self, engine: SGLangEngine) -> None:
        self.engine = engine
        self.paused = False
        self.clock = LoopClock()
        self._restarting: dict[int, asyncio.Task[None]] = {}
        self._postponed: set[int] | None = None
        self._probes: dict[int, asyncio.Task[None]] = {}

    async def run(self, replica: Replica) -> None:
        """Check a replica every `health_interval_s` seconds, for ever; all of them not at once, but in turn."""
        healthy_at = self.clock.now()
        pause = self.engine.config.health_interval_s * (replica.index + 1) / len(self.engine.replicas)
        while True:
            await asyncio.sleep(pause)
            pause = self.engine.config.health_interval_s
            try:
                healthy_at = await self._check_once(replica, healthy_at)
            except Exception:
                # Whatever a server answers, keep checking it.
                LOGGER.exception("the health check of SGLang server %s failed", replica.url)

    async def _check_once(self, replica: Replica, healthy_at: float) -> float:
        """Check a replica once; return the time when it was last known to be healthy, by the loop's clock."""
        if self.paused or replica.index in self._restarting:
            return self.clock.now()
        if replica.state == "down":
            await (self._readmit(replica) if not self._process_ended(replica) else self._schedule_restart(replica))
            return self.clock.now()
        if self._process_ended(replica):
            await self.mark_down(replica, "its process has ended")
        elif await self._healthy(replica) or self.paused:
            await self._note_queue(replica)
            return self.clock.now()
        elif (silent_s := self.clock.now() - healthy_at) > self.engine.config.health_timeout_s:
            await self.mark_down(replica, f"no sign of health for {silent_s:.0f} s")
        return healthy_at

    async def _note_queue(self, replica: Replica) -> None:
        """Note how many requests wait within a server that is sampling."""
        if replica.in_flight and (waiting := await replica.api.waiting()) is not None:
            self.engine.usage.queue(waiting)

    async def probe(self, replica: Replica) -> None:
        """Check whether a server still answers, after requests to it got no answer; once for all that fail together."""
        probe = self._probes.get(replica.index)
        if probe is None:
            probe = self._probes[replica.index] = asyncio.get_running_loop().create_task(self._probe(replica))
            probe.add_done_callback(lambda _: self._probes.pop(replica.index))
        await asyncio.shield(probe)

    async def _probe(self, replica: Replica) -> None:
        if replica.state == "down" or replica.index in self._restarting:
            return
        if self._process_ended(replica):
            await self.mark_down(replica, "its process has ended")
        elif not await replica.api.alive():
            await self.mark_down(replica, "it does not answer")

    async def trial(self, replica: Replica) -> bool:
        """Return whether a server that failed its samples generates a token."""
        body = {"input_ids": [0], "sampling_params": {"max_new_tokens": 1}}
        while self.paused:
            await asyncio.sleep(0.1)
        try:
            await replica.api.generate(body, self.engine.config.health_timeout_s)
        except ApiError:
            return False
        return True

    async def check_stamp(self, replica: Replica) -> None:
        """Stop using a server that no longer holds the run's weights; called after an answer of other weights."""
        if self.paused or replica.state != "serving":
            return
        try:
            stamp = await replica.api.stamp()
        except ApiError:
            return
        if stamp != self.engine.stamp.of(self.engine.weight_version) and replica.state == "serving" and not self.paused:
            reason = f"it holds weights stamped {stamp!r}, which are not those of version {self.engine.weight_version}"
            LOGGER.warning("SGLang server %s is not used before the next weight update: %s", replica.url, reason)
            replica.take_out(reason, "stale")

    async def mark_down(self, replica: Replica, reason: str) -> None:
        """Take a replica out, and restart it in the background if this process owns its server."""
        if replica.state == "down":
            return
        LOGGER.warning("SGLang server %s is taken out: %s", replica.url, reason)
        self.engine.counts.taken_out += 1
        replica.take_out(reason)
        await self._schedule_restart(replica)

    async def _schedule_restart(self, replica: Replica) -> None:
        """Schedule a restart in the background, if this process owns the server and has restarts left."""
        servers = self.engine.servers
        if servers is None or replica.own is None or servers.exhausted(replica.own):
            return
        if self._postponed is not None:
            self._postponed.add(replica.index)
            return
        self._restarting[replica.index] = asyncio.get_running_loop().create_task(self._restart(replica))

    async def postpone_restarts(self) -> None:
        """Let running restarts end, and start no server until `restart_postponed`: its memory is the trainer's."""
        while self._restarting:
            await asyncio.sleep(0.1)
        self._postponed = set()

    @property
    def lost(self) -> bool:
        """Return whether a restart was postponed."""
        return bool(self._postponed)

    async def restart_postponed(self) -> None:
        """Begin the restarts that were postponed; none is postponed any more."""
        postponed, self._postponed = self._postponed or set(), None
        for replica in self.engine.replicas:
            if replica.index in postponed and replica.state == "down":
                await self._schedule_restart(replica)

    async def wait_for_servers(self) -> None:
        """Wait until no restart is running and at least one server answers.

        A given server may be unreachable for a while: it gets `health_timeout_s` seconds to return.
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
            replica.abandoned.clear()
            await self._readmit(replica)
        except (ServerError, OSError, ValueError) as error:
            replica.reason = str(error)
            LOGGER.error("%s", error)
        finally:
            self._restarting.pop(replica.index, None)

    async def _readmit(self, replica: Replica) -> None:
        """Readmit a server that answers again.

        It serves at once if it still has the run's weights, else after the next update.
        """
        servers = self.engine.servers
        if servers is not None and replica.own is not None:
            replica.api.url = replica.ask.url = servers.processes[replica.own].url
        try:
            info, stamp = await replica.api.info(), await replica.api.stamp()
        except ApiError as error:
            replica.reason = str(error)
            return
        if problem := info.problem_with(self.engine.lengths):
            if replica.reason != problem:
                LOGGER.error("SGLang server %s is back, and not used: %s", replica.url, problem)
            replica.reason = problem
            return
        replica.info = info
        replica.breaker.succeed()
        await self._abort_abandoned(replica)
        current = stamp == self.engine.stamp.of(self.engine.weight_version) and not replica.half_updated
        replica.state, replica.reason = ("serving", "") if current else ("stale", "it was restarted")
        LOGGER.warning("SGLang server %s is back, %s", replica.url, replica.state)

    async def _abort_abandoned(self, replica: Replica) -> None:
        """Abort the requests that were given up while the server did not answer: it would go on sampling them."""
        aborts = [replica.api.abort(rid) for rid in replica.abandoned]
        replica.abandoned.clear()
        await asyncio.gather(*aborts, return_exceptions=True)

    def _process_ended(self, replica: Replica) -> bool:
        servers = self.engine.servers
        return servers is not None and replica.own is not None and not servers.processes[replica.own].alive()

    async def _healthy(self, replica: Replica) -> bool:
        async with replica.health_lock:
            if replica.asleep:
                return await replica.api.alive()
            try:
                await replica.api.get("/health", self.engine.config.health_timeout_s)
            except ApiError:
                return False
            return True
