"""Seconds that an asyncio loop has lived through: while its process stands still, they do not count."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

TICK_S = 0.25
"""Seconds between ticks; the loop stands still when the next one is late."""


class LoopClock:
    """Clock of a loop that judges whether others answer in time.

    A process that was stopped, or had no processor for a minute, has not waited for a minute: the answers are in its
    sockets. `run` ticks, for ever, in the loop. clock: seconds, for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ticked = clock()
        self._stood_still_s = 0.0

    def now(self) -> float:
        """Return the seconds that the loop has lived through, from any start."""
        now = self._clock()
        return now - self._stood_still_s - self._late(now)

    async def run(self) -> None:
        """Tick for ever."""
        while True:
            self.tick()
            await asyncio.sleep(TICK_S)

    def tick(self) -> None:
        """Note that the loop is alive."""
        now = self._clock()
        self._stood_still_s += self._late(now)
        self._ticked = now

    def _late(self, now: float) -> float:
        return max(0.0, now - self._ticked - 2 * TICK_S)
