"""A running phase of a run: its progress, speed and remaining time."""

from __future__ import annotations

import threading
from collections.abc import Callable

from megatron_hdpo.tracking.formats import amount, duration, number, pace, plural

_ESTIMATE_AFTER_S = 3.0
_ESTIMATE_FROM_SHARE = 0.05


class Phase:
    """A phase with its progress; `Console.phase` makes it. Every method may be called from any thread.

    total: units to do, None where unknown. unit: singular.
    """

    def __init__(self, name: str, total: float | None, unit: str, clock: Callable[[], float]) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done: float = 0
        self.state = ""
        self._clock, self._start = clock, clock()
        self._first: tuple[float, float] | None = None
        self._lock = threading.Lock()

    def advance(self, n: float = 1) -> None:
        """Count n more units as done."""
        with self._lock:
            self.done += n
            self._first = self._first or (self._clock(), self.done)

    def extend(self, n: float) -> None:
        """Add n units to the total."""
        with self._lock:
            self.total = (self.total or 0) + n

    def note(self, state: str) -> None:
        """Set the text that says what the phase is doing now."""
        self.state = state

    @property
    def elapsed(self) -> float:
        """Return the seconds since the phase began."""
        return self._clock() - self._start

    @property
    def shown(self) -> float:
        """Return the units done, never more than the total: the padding of a batch is counted as done, too."""
        return self.done if self.total is None else min(self.done, self.total)

    @property
    def left_s(self) -> float | None:
        """Return an estimate of the remaining seconds; None without a total, and at the start, when it would be wild.

        The speed is measured from the first unit on: what comes before that is often a preparation.
        """
        if not self.total or self._first is None:
            return None
        since, progress = self._clock() - self._first[0], self.done - self._first[1]
        if progress <= 0 or since < _ESTIMATE_AFTER_S or self.done < _ESTIMATE_FROM_SHARE * self.total:
            return None
        return max(0.0, self.total - self.done) * since / progress

    def progress(self) -> str:
        """Return `512/2,048 tokens (25 %), 170/s, 9 s left`, or as much of it as is known; then the state.

        Without an amount the text is the seconds that have passed.
        """
        return f"{self.amounts()}, {self.state}" if self.state else self.amounts()

    def amounts(self) -> str:
        """Return the text of `progress` without the state."""
        return ", ".join(self._counted() or [duration(self.elapsed)])

    def summary(self) -> str:
        """Return the text for the end: `2,048 tokens in 12 s, 170/s`, or `done in 12 s`; then the state."""
        what = amount(self.shown, self.unit) if self.shown else "done"
        parts = [f"{what} in {duration(self.elapsed)}"]
        if self.shown and self.elapsed > 0:
            parts.append(pace(self.shown / self.elapsed))
        return ", ".join([*parts, self.state] if self.state else parts)

    def position(self) -> str:
        """Return `rollout 512/2,048 samples, on rank 0`: what is done, without times, so a change is progress."""
        done, total = number(self.done), self.total
        counted = "" if not (total or self.done) else f" {done}/{number(total)}" if total else f" {done}"
        unit = f" {plural(total or self.done, self.unit)}" if counted else ""
        return self.name + counted + unit + (f", {self.state}" if self.state else "")

    def _counted(self) -> list[str]:
        if not (self.total or self.shown):
            return []
        if not self.total:
            parts = [amount(self.shown, self.unit)]
        else:
            share = f"{100 * self.shown / self.total:.0f} %"
            parts = [f"{number(self.shown)}/{number(self.total)} {plural(self.total, self.unit)} ({share})"]
        if self.shown and self.elapsed > 0:
            parts.append(pace(self.shown / self.elapsed))
        if (left := self.left_s) and self.shown < (self.total or 0):
            parts.append(f"{duration(left)} left")
        return parts
