"""Elapsed and remaining time of a run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from megatron_hdpo.tracking.formats import duration

_RECENT_STEPS = 100


class RunProgress:
    """Clock of a run: the time since its start, and an estimate of the rest from the latest steps.

    The steps' time includes what happens between them: evaluations, checkpoints. The first step is not measured: it is
    often slower than the others.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._start = clock, clock()
        self._ends: deque[tuple[int, float]] = deque(maxlen=_RECENT_STEPS)
        self._total = 0

    @property
    def elapsed_s(self) -> float:
        """Return the seconds since the run was started, or started again."""
        return self._clock() - self._start

    @property
    def left_s(self) -> float | None:
        """Return the estimated seconds to the end of the last step; None before the second step has ended."""
        if len(self._ends) < 2:
            return None
        (first, began), (last, ended) = self._ends[0], self._ends[-1]
        rest = (self._total - last) * (ended - began) / (last - first)
        return max(0.0, rest - (self._clock() - ended))

    def step_done(self, step: int, total: int) -> None:
        """Take note that a step has ended, of `total` steps."""
        self._ends.append((step, self._clock()))
        self._total = total

    def text(self) -> str:
        """Return `12 of 2,000 steps done, 1 h 02 min elapsed, about 3 h 10 min left`, or the part that is known."""
        done = f"{self._ends[-1][0]:,} of {self._total:,} steps done, " if self._ends else ""
        return done + self.times()

    def times(self) -> str:
        """Return `1 h 02 min elapsed, about 3 h 10 min left`, or the part that is known."""
        elapsed, left = f"{duration(self.elapsed_s)} elapsed", self.left_s
        ended = bool(self._ends) and self._ends[-1][0] >= self._total
        return elapsed if left is None or ended else f"{elapsed}, about {duration(left)} left"
