"""How an engine uses its fake servers, looked at while it samples, and what that costs this process."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
from _canned import processor_seconds
from _fake_fleet import Fault, ServerModel, capacity

from megatron_hdpo.rollout.sglang.engine import SGLangEngine

LOOK_S = 0.1


class Monitor:
    """Looks at the engine's slots ten times a second, from the start of a block to its end."""

    def __init__(self, engine: SGLangEngine) -> None:
        self.engine = engine
        self._looks: list[tuple[float, np.ndarray]] = []
        self._queue_s = self._end_s = 0.0
        self._queue_tally: list[dict[str, float]] = []
        self._tally: list[dict[str, float]] = []
        self._logged = CountingHandler()
        self._most_files = self._most_memory = 0

    def __enter__(self) -> Monitor:
        logging.getLogger("megatron_hdpo").addHandler(self._logged)
        self._memory, self._cpu, self._begin = resident_bytes(), processor_seconds(), time.monotonic()
        self._looking: Future[None] = self.engine.thread.start(self._look())
        return self

    def __exit__(self, *error: object) -> None:
        self._end_s, self._cpu = self.seconds, processor_seconds() - self._cpu
        self._looking.cancel()
        logging.getLogger("megatron_hdpo").removeHandler(self._logged)
        if error[0] is None:
            self._tally = self.engine.thread.run(self.engine.replicas[0].api.get("/tally", 60))
        if not self._queue_tally:
            self._queue_s, self._queue_tally = self._end_s, self._tally

    @property
    def seconds(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self._begin

    async def _look(self) -> None:
        waited = False
        while True:
            waiting = len(self.engine._dispatcher._waiting)
            self._looks.append((self.seconds, np.array([replica.taken for replica in self.engine.replicas])))
            self._most_files = max(self._most_files, len(os.listdir("/dev/fd")))
            self._most_memory = max(self._most_memory, resident_bytes())
            if waited and not waiting and not self._queue_tally:
                self._queue_s = self.seconds
                self._queue_tally = await self.engine.replicas[0].api.get("/tally", 60)
            waited = waited or bool(waiting)
            await asyncio.sleep(LOOK_S)

    def balance(self, model: ServerModel, faults: Sequence[Fault]) -> dict[str, float]:
        """Return how the servers were used: until no sample waited any more (queue_s), and until the end (seconds).

        tail_s: from the first idle server to the end. Idleness and the two ratios of maximum and mean are those of the
        servers without a fault.
        """
        servers = len(self.engine.replicas)
        slow = [fault.server for fault in faults if fault.kind == "slow"]
        well = np.setdiff1d(np.arange(servers), [fault.server for fault in faults])
        work, work_queued = (np.array([s["work"] for s in tally]) for tally in (self._tally, self._queue_tally))
        begun = [(at, taken[well]) for at, taken in self._looks if taken.any()][1:]
        first_idle_s = next((at for at, taken in begun if not taken.min()), self._end_s)
        queued = [taken for at, taken in begun if at < self._queue_s and taken.any()]
        found = {
            "seconds": self._end_s,
            "queue_s": self._queue_s,
            "tail_s": self._end_s - first_idle_s,
            "of_capacity_until_queue_s": work_queued.sum() / capacity(model, servers, faults, self._queue_s),
            "of_capacity": work.sum() / capacity(model, servers, faults, self._end_s),
            "in_flight_max_over_mean": np.mean([taken.max() / taken.mean() for taken in queued]),
            "tokens_max_over_mean": work[well].max() / work[well].mean(),
            "tokens_of_slow_over_mean": work[slow].mean() / work[well].mean(),
            "prompts_in_cache": sum(s["hits"] for s in self._tally) / sum(s["prompts"] for s in self._tally),
            "longest_server_queue": max(server["most_queued"] for server in self._tally),
        }
        return {name: round(float(value), 3) for name, value in found.items()}

    def cost(self, samples: int) -> dict[str, float]:
        """Return what the samples cost this process."""
        return {
            "cpu_s_per_1000_samples": round(1000 * self._cpu / samples, 2),
            "cpu_share_of_a_core": round(self._cpu / self._end_s, 2),
            "memory_mib": round((self._most_memory - self._memory) / 2**20),
            "open_files": self._most_files,
            "log_lines": self._logged.lines,
        }


class CountingHandler(logging.Handler):
    """Counts warnings and errors."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Count a line."""
        self.lines += 1


def resident_bytes() -> int:
    """Return the memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
