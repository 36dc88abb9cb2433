"""Wall seconds per phase of a step."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext


class PhaseTimer:
    """Timer of phases: collects their wall seconds and returns them, once per step, as `time/<phase>_s`.

    A phase inside another one (of the same thread) is subtracted from the outer one's time, so that the phases of one
    thread add up to no more than `time/step_s`, the wall seconds since the previous `metrics()`. Phases of the same
    name add up. clock: seconds, monotonic. `mark(phase)` is entered around each phase; a profiler may set it.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._local = threading.local()
        self._seconds: dict[str, float] = {}
        self._since = clock()
        self.mark: Callable[[str], AbstractContextManager[object]] = nullcontext

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Time the block as `phase`, also when it raises. "step" is refused: it is the name of the total."""
        key = metric_key(phase)
        inner: list[list[float]] = self._local.__dict__.setdefault("inner", [])
        children = [0.0]
        inner.append(children)
        start = self._clock()
        try:
            with self.mark(phase):
                yield
        finally:
            elapsed = self._clock() - start
            inner.pop()
            if inner:
                inner[-1][0] += elapsed
            with self._lock:
                self._seconds[key] = self._seconds.get(key, 0.0) + elapsed - children[0]

    def metrics(self) -> dict[str, float]:
        """Return `time/<phase>_s` of every phase that ended since the last call, and `time/step_s`; then start over."""
        with self._lock:
            now = self._clock()
            result = {f"time/{key}_s": seconds for key, seconds in self._seconds.items()}
            result["time/step_s"] = now - self._since
            self._seconds, self._since = {}, now
        return result


def metric_key(phase: str) -> str:
    """Return "privileged_rollout" for "privileged rollout". Raises ValueError on an empty name and on "step"."""
    key = re.sub(r"[^a-z0-9]+", "_", phase.lower()).strip("_")
    if key in ("", "step"):
        raise ValueError(f"phase {phase!r}: give it a name of its own (time/step_s is the whole step)")
    return key
