"""Reading of answers outside the trainer's process, whose interpreter is needed to launch kernels."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Future

from megatron_hdpo.rewards.killable import KillableWorkers
from megatron_hdpo.rewards.worker import Outcome, end_with_parent
from megatron_hdpo.rollout.sglang.answers import Asked
from megatron_hdpo.rollout.sglang.reading import RawAnswer, Reading, read_answer, read_in_worker

LOGGER = logging.getLogger(__name__)
SHORT_ANSWER = 16_384
"""Bytes of an answer, some 350 tokens, up to which reading it costs no more than sending it to another process."""
TIME_LIMIT_S = 60.0
"""Seconds after which the process that reads an answer counts as hung: a thousand times what a long answer takes."""


class Parsers:
    """Reads answers: short ones at once, long ones in processes of their own, which start with the first of them.

    A process that dies or hangs is replaced, and the answer is read once more. `read` runs in the engine's loop.

    processes: their number; 0: all answers are read at once. time_limit_s: seconds for one answer.
    """

    def __init__(self, processes: int, time_limit_s: float = TIME_LIMIT_S) -> None:
        self._workers = KillableWorkers(processes, end_with_parent, ()) if processes else None
        self._time_limit_s = time_limit_s
        self._first: asyncio.Task[Future[Outcome]] | None = None

    async def read(self, answer: RawAnswer, asked: Asked) -> Reading:
        """Return what an answer holds; `unread` if two processes in a row died or hung over it."""
        if self._workers is None or answer.size <= SHORT_ANSWER:
            return read_answer(answer, asked)
        call = await self._call(self._workers, answer, asked)
        outcome: Outcome = await asyncio.wrap_future(call)
        if outcome.error is None:
            reading: Reading = outcome.value
            return reading
        LOGGER.warning("an answer of %d bytes is given up, unread: %s", answer.size, outcome.error)
        return Reading("unread", problem=outcome.error)

    async def _call(self, workers: KillableWorkers, answer: RawAnswer, asked: Asked) -> Future[Outcome]:
        def call() -> Future[Outcome]:
            return workers.call(read_in_worker, (answer, asked), self._time_limit_s, retries=1)

        if self._first is not None:
            await asyncio.wait({self._first})
            return call()
        # The first call starts the processes, which takes a second.
        self._first = asyncio.create_task(asyncio.to_thread(call))
        return await self._first

    def close(self) -> None:
        """End the processes; answers that are being read come back unread. Idempotent."""
        if self._workers is not None:
            self._workers.close()
