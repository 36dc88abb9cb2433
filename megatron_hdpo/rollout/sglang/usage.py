"""Use of the servers since the last step, as metrics: requests at work and waiting, tokens per second, cache, sleep."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from megatron_hdpo.types.metrics import Metric


class _Integral:
    """A number that goes up and down, and its integral over time. busy_s: seconds in which it was above 0."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since = clock()
        self.now = 0
        self.area = self.busy_s = 0.0

    def add(self, change: int) -> None:
        """Change the number."""
        now = self._clock()
        self.area += self.now * (now - self._since)
        self.busy_s += (self.now > 0) * (now - self._since)
        self.now, self._since = self.now + change, now

    def take(self) -> tuple[float, float]:
        """Return the area and the busy seconds up to now, and begin both anew."""
        self.add(0)
        taken = self.area, self.busy_s
        self.area = self.busy_s = 0.0
        return taken


class Usage:
    """Use of one rank's servers. All methods are called in the engine's loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._samples, self._running, self._asleep = _Integral(clock), _Integral(clock), _Integral(clock)
        self._tokens = self._prompt_tokens = self._cached_tokens = 0
        self._queues: list[int] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count a request as at work on a server."""
        self._running.add(1)
        try:
            yield
        finally:
            self._running.add(-1)

    def sample(self, change: int) -> None:
        """Count a sample as begun (1) or ended (-1)."""
        self._samples.add(change)

    def sleep(self, asleep: bool) -> None:
        """Note that the servers' memory is the trainer's from now on, or theirs again."""
        self._asleep.add(int(asleep) - self._asleep.now)

    def answer(self, tokens: int, meta: Mapping[str, Any]) -> None:
        """Count the tokens that an answer holds, those of its prompt, and those that came from the prefix cache."""
        self._tokens += tokens
        prompt, cached = meta.get("prompt_tokens"), meta.get("cached_tokens")
        if isinstance(prompt, int) and isinstance(cached, int):
            self._prompt_tokens += prompt
            self._cached_tokens += cached

    def queue(self, waiting: int) -> None:
        """Note how many requests wait within one server, which reports it now."""
        self._queues.append(waiting)

    def take(self) -> dict[str, float]:
        """Return the use as `servers/...` metrics, for the sums over ranks, and begin anew.

        What no server has told is left out.
        """
        running, busy_s = self._running.take()
        samples, _ = self._samples.take()
        metrics: dict[str, float] = {"servers/asleep_s": Metric(self._asleep.take()[1], "max")}
        if busy_s:
            metrics["servers/running"] = Metric(running / busy_s, "sum")
            metrics["servers/waiting"] = Metric(max(samples - running, 0.0) / busy_s, "sum")
            metrics["servers/tokens_per_s"] = Metric(self._tokens / busy_s, "sum")
        if self._prompt_tokens:
            metrics["servers/cache_hit_rate"] = self._cached_tokens / self._prompt_tokens
        if self._queues:
            metrics["servers/queued"] = sum(self._queues) / len(self._queues)
        self._tokens = self._prompt_tokens = self._cached_tokens = 0
        self._queues.clear()
        return metrics
