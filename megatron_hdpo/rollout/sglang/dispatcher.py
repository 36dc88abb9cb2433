"""Choice of a server for each sample, made when a slot is free: load balancing that knows of caches and failures."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from functools import partial

from megatron_hdpo.rollout.engine import EngineLostWeights
from megatron_hdpo.rollout.sglang.free_servers import FreeServers
from megatron_hdpo.rollout.sglang.replica import Replica, first_few
from megatron_hdpo.rollout.sglang.waiting import Prompt, WaitingSample, WaitingSamples
from megatron_hdpo.types.errors import UserError

LOGGER = logging.getLogger(__name__)
TICK_S = 0.1

Trial = Callable[[Replica], Awaitable[bool]]


class ServersFail(UserError):
    """Every server has failed all of its samples for a long time."""


class Dispatcher:
    """Gives samples slots on servers, the oldest sample first.

    A sample waits for a slot on any server that is well, so a fast server takes more samples than a slow one. It goes
    to the server that has the prefix of its prompt in its cache while that one is not much fuller than the others, and
    not to a server that failed it before while another is well. A freed slot is offered to samples of prompts in the
    server's cache first. All methods run in the engine's loop.

    A sample costs the same for any number of servers: all of them are looked at by `refresh` only.

    limit: slots of each server. silence_s: longest time for which all servers may fail before ServersFail is raised.
    trial: asks a server that failed for a token and returns whether it came.
    """

    def __init__(self, replicas: Sequence[Replica], limit: int, silence_s: float, trial: Trial) -> None:
        self.replicas, self.limit, self.silence_s = replicas, limit, silence_s
        self._trial = trial
        self._waiting = WaitingSamples()
        self._prompts: dict[str, Prompt] = {}
        self._well: set[int] = set()
        self._free = FreeServers(limit)
        self._trials: dict[int, asyncio.Task[None]] = {}
        self._all_fail_since: float | None = None

    @asynccontextmanager
    async def slot(self, affinity: str, n: int, avoid: Collection[int]) -> AsyncIterator[Replica]:
        """Hold a slot of a server.

        affinity, n: the prompt, and its number of samples. avoid: indices of servers that failed this sample. Raises
        EngineLostWeights when no server has the run's weights, ServersFail when all have failed for `silence_s`.
        """
        prompt = self._prompts.setdefault(affinity, Prompt())
        prompt.samples += 1
        waiting = WaitingSample(prompt, 2 * n, avoid)
        self._waiting.add(waiting)
        replica: Replica | None = None
        try:
            self.assign()
            replica = await waiting.slot
            yield replica
        finally:
            self._waiting.discard(waiting)
            if (
                replica is None
                and waiting.slot.done()
                and not waiting.slot.cancelled()
                and not waiting.slot.exception()
            ):
                replica = waiting.slot.result()  # cancelled in the moment in which it got the slot
            if replica is not None:
                self._take(replica, -1)
            prompt.samples -= 1
            if not prompt.samples:
                del self._prompts[affinity]
            self.assign()

    async def run(self) -> None:
        """Notice changes of servers' states, assign the slots that they free, and try servers that failed; for ever."""
        while True:
            await asyncio.sleep(TICK_S)
            self.refresh()
            self.assign()
            for replica in self._serving():
                if replica.breaker.due and replica.index not in self._trials:
                    self._trials[replica.index] = asyncio.get_running_loop().create_task(self._try(replica))

    def refresh(self) -> None:
        """Look at the state of every server. Without it a server that is well again gets samples a tick later."""
        serving = self._serving()
        self._well = {replica.index for replica in serving if replica.breaker.state != "open"}
        for replica in self.replicas:
            self._free.put(replica, self._has_room(replica))
        self._waiting.leave_homes(self._well)
        if self._well:
            self._all_fail_since = None
        elif self._waiting and serving:
            self._watch_silence(serving)
        elif self._waiting:
            self._waiting.fail_all(EngineLostWeights("no server has the run's weights"))

    def assign(self) -> None:
        """Give free slots to waiting samples."""
        if self._waiting and not self._well:
            self.refresh()
        while self._waiting and (pair := self._next_pair()):
            waiting, replica = pair
            self._waiting.discard(waiting)
            home = waiting.prompt.home
            if home is None or home in self._free:  # a home that is only full has the prompt in its cache still
                self._waiting.settle(waiting.prompt, replica)
            self._take(replica, 1)
            waiting.slot.set_result(replica)

    def _next_pair(self) -> tuple[WaitingSample, Replica] | None:
        """Return a sample that waits, and the server that it should get; None when no slot is free for any."""
        for idlest in self._free:
            if not self._has_room(idlest):  # it was lost since the last look
                self.refresh()
                return self._next_pair()
            waiting = self._waiting.next_for(idlest, partial(self._accepts, idlest))
            if waiting is not None:
                return waiting, self._best(waiting, idlest)
        return None

    def _accepts(self, replica: Replica, waiting: WaitingSample) -> bool:
        """Return whether a sample may have a slot of a server: it waits for another one than the one that failed it."""
        if waiting.slot.done():
            return False
        return replica.index not in waiting.avoid or self._well.issubset(waiting.avoid)

    def _best(self, waiting: WaitingSample, idlest: Replica) -> Replica:
        """Return the server that sampled this prompt last, or the idlest one if that has a good deal less to do."""
        home = waiting.prompt.home
        if home is None or home not in self._free or not self._has_room(home) or not self._accepts(home, waiting):
            return idlest
        return home if home.taken <= max(2 * idlest.taken, idlest.taken + waiting.spread) else idlest

    def _take(self, replica: Replica, slots: int) -> None:
        replica.taken += slots
        self._free.put(replica, self._has_room(replica))

    def _has_room(self, replica: Replica) -> bool:
        if replica.state != "serving" or replica.breaker.state == "open":
            return False
        return replica.taken < (1 if replica.breaker.state == "half_open" else self.limit)

    def _serving(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.state == "serving"]

    def _watch_silence(self, serving: Sequence[Replica]) -> None:
        """Say when all servers fail, and end the wait for one when that has lasted for too long."""
        now = time.monotonic()
        if self._all_fail_since is not None and now - self._all_fail_since <= self.silence_s:
            return
        reasons = first_few([replica.breaker.reason for replica in serving])
        if self._all_fail_since is None:
            self._all_fail_since = now
            LOGGER.warning("every SGLang server fails its samples; waiting up to %g s: %s", self.silence_s, reasons)
            return
        self._waiting.fail_all(
            ServersFail(
                f"rollout.sglang: every server has failed its samples for {self.silence_s:g} s, which is "
                f"request_timeout_s; see logs/node*/sglang_*.log in the run folder: {reasons}"
            )
        )

    async def _try(self, replica: Replica) -> None:
        try:
            if await self._trial(replica):
                replica.breaker.state = "half_open"
                self.refresh()
                self.assign()
            else:
                replica.breaker.stay_open()
        finally:
            del self._trials[replica.index]
