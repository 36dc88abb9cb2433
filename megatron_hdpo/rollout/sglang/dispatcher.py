"""Choice of a server for each sample, made when a slot is free: load balancing that knows of caches and failures."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from megatron_hdpo.rollout.engine import EngineLostWeights
from megatron_hdpo.rollout.sglang.replica import Replica
from megatron_hdpo.types.errors import UserError

LOGGER = logging.getLogger(__name__)
TICK_S = 0.1

Trial = Callable[[Replica], Awaitable[bool]]


class ServersFail(UserError):
    """Every server has failed all of its samples for a long time."""


@dataclass(eq=False)
class _Waiting:
    """A sample that waits for a slot. spread: samples more than on the idlest server that its cache is worth."""

    affinity: str
    spread: int
    avoid: Collection[int]
    slot: asyncio.Future[Replica] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Dispatcher:
    """Gives samples slots on servers, the oldest sample first.

    A sample waits for a slot on any server that is well, so a fast server takes more samples than a slow one. It goes
    to the server that has the prefix of its prompt in its cache while that one is not much fuller than the others, and
    not to a server that failed it before while another is well. All methods run in the engine's loop.

    limit: slots of each server. silence_s: longest time for which all servers may fail before ServersFail is raised.
    trial: asks a server that failed for a token and returns whether it came.
    """

    def __init__(self, replicas: Sequence[Replica], limit: int, silence_s: float, trial: Trial) -> None:
        self.replicas, self.limit, self.silence_s = replicas, limit, silence_s
        self._trial = trial
        self._waiting: dict[_Waiting, None] = {}
        self._homes: dict[str, Replica] = {}
        self._holders: dict[str, int] = {}
        self._trials: dict[int, asyncio.Task[None]] = {}
        self._all_fail_since: float | None = None

    @asynccontextmanager
    async def slot(self, affinity: str, n: int, avoid: Collection[int]) -> AsyncIterator[Replica]:
        """Hold a slot of a server.

        affinity, n: the prompt, and its number of samples. avoid: indices of servers that failed this sample. Raises
        EngineLostWeights when no server has the run's weights, ServersFail when all have failed for `silence_s`.
        """
        waiting = _Waiting(affinity, 2 * n, avoid)
        self._waiting[waiting] = None
        self._holders[affinity] = self._holders.get(affinity, 0) + 1
        replica: Replica | None = None
        try:
            self.assign()
            replica = await waiting.slot
            yield replica
        finally:
            self._waiting.pop(waiting, None)
            if (
                replica is None
                and waiting.slot.done()
                and not waiting.slot.cancelled()
                and not waiting.slot.exception()
            ):
                replica = waiting.slot.result()  # cancelled in the moment in which it got the slot
            if replica is not None:
                replica.taken -= 1
            self._leave(affinity)
            self.assign()

    async def run(self) -> None:
        """Assign slots that a change of a server's state has freed, and try servers that failed; for ever."""
        while True:
            await asyncio.sleep(TICK_S)
            self.assign()
            for replica in self._serving():
                if replica.breaker.due and replica.index not in self._trials:
                    self._trials[replica.index] = asyncio.get_running_loop().create_task(self._try(replica))

    def assign(self) -> None:
        """Give free slots to waiting samples."""
        if not self._waiting:
            return
        serving = self._serving()
        if not serving:
            self._fail_all(EngineLostWeights("no server has the run's weights"))
            return
        well = [replica for replica in serving if replica.breaker.state != "open"]
        self._watch_silence(serving, well)
        free = [replica for replica in well if self._has_room(replica)]
        given = []
        for waiting in self._waiting:
            if not free:
                break
            others = [replica for replica in well if replica.index not in waiting.avoid] or well
            fitting = [replica for replica in others if replica in free]
            if fitting and not waiting.slot.done():
                replica = self._best(waiting, fitting)
                replica.taken += 1
                self._homes[waiting.affinity] = replica
                waiting.slot.set_result(replica)
                given.append(waiting)
                free = [replica for replica in free if self._has_room(replica)]
        for waiting in given:
            del self._waiting[waiting]

    def _best(self, waiting: _Waiting, fitting: Sequence[Replica]) -> Replica:
        """Return the server that sampled this prompt last, or the idlest one if that has a good deal less to do."""
        least = min(fitting, key=lambda replica: replica.taken)
        home = self._homes.get(waiting.affinity)
        if home is not None and home in fitting and home.taken <= max(2 * least.taken, least.taken + waiting.spread):
            return home
        return least

    def _has_room(self, replica: Replica) -> bool:
        return replica.taken < (1 if replica.breaker.state == "half_open" else self.limit)

    def _serving(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.state == "serving"]

    def _leave(self, affinity: str) -> None:
        self._holders[affinity] -= 1
        if not self._holders[affinity]:
            del self._holders[affinity]
            self._homes.pop(affinity, None)

    def _watch_silence(self, serving: Sequence[Replica], well: Sequence[Replica]) -> None:
        """Say when all servers fail, and end the wait for one when that has lasted for too long."""
        if well:
            self._all_fail_since = None
            return
        now = time.monotonic()
        reasons = "; ".join(replica.breaker.reason for replica in serving)
        if self._all_fail_since is None:
            self._all_fail_since = now
            LOGGER.warning("every SGLang server fails its samples; waiting up to %g s: %s", self.silence_s, reasons)
        elif now - self._all_fail_since > self.silence_s:
            self._fail_all(
                ServersFail(
                    f"rollout.sglang: every server has failed its samples for {self.silence_s:g} s, which is "
                    f"request_timeout_s; see logs/node*/sglang_*.log in the run folder: {reasons}"
                )
            )

    def _fail_all(self, error: Exception) -> None:
        for waiting in self._waiting:
            if not waiting.slot.done():
                waiting.slot.set_exception(error)
        self._waiting.clear()

    async def _try(self, replica: Replica) -> None:
        try:
            if await self._trial(replica):
                replica.breaker.state = "half_open"
                self.assign()
            else:
                replica.breaker.stay_open()
        finally:
            del self._trials[replica.index]
