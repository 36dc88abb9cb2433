"""Measurements of a rehearsal, phase by phase: memory, launches, waits, collectives, FLOPs."""

from __future__ import annotations

import resource
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import torch
import torch.distributed as dist

from _rehearsal.device import NullGpu
from _rehearsal.launch import ROOT
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.tracking.console import Console
from megatron_hdpo.tracking.phase import Phase

KINDS = {
    "AllGather": "all_gather",
    "ReduceScatter": "reduce_scatter",
    "AllReduce": "all_reduce",
    "Broadcast": "broadcast",
    "Reduce": "reduce",
    "AllToAll": "all_to_all",
    "Send": "send",
    "Recv": "recv",
}
_GROUPS = "mp intra_dist_opt dp_cp dp embd expt_dp tp_ep ep expt_tp pp cp tp"


@dataclass(frozen=True)
class Measured:
    """What happened in a phase, and the bytes at its end.

    peak: most bytes allocated since the phase before. reserved: of torch's allocator; its peak. free: of the device.
    pinned: on the host, its peak. rss: of the process. collectives: (kind, group) -> (number, bytes), the larger side
    on this rank. waits: by place in the source.
    """

    phase: str
    seconds: float
    allocated: int
    peak: int
    reserved: int
    reserved_peak: int
    free: int
    pinned: int
    rss: int
    launches: int
    flops: float
    device_waits: int
    to_device: tuple[int, int]
    to_host: tuple[int, int]
    collectives: dict[tuple[str, str], tuple[int, int]]
    waits: dict[str, int]


@dataclass
class Meter:
    """Measures the phases of one rank. `phases`: those that ended, in order; `now`: names of the running ones."""

    gpu: NullGpu
    context: ParallelContext | None = None
    phases: list[Measured] = field(default_factory=list)
    now: list[str] = field(default_factory=list)
    _waits: Counter[str] = field(default_factory=Counter)
    _began: float = field(default_factory=time.monotonic)

    @contextmanager
    def watching(self) -> Iterator[Meter]:
        """Measure until the block ends."""
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("always")
            warnings.showwarning = self._warned
            for owner, name in (
                (torch.cuda, "synchronize"),
                (torch.cuda.Event, "synchronize"),
                (torch.cuda.Stream, "synchronize"),
            ):
                stack.enter_context(patch.object(owner, name, self._noting(getattr(owner, name))))
            torch.cuda.set_sync_debug_mode("warn")
            stack.callback(torch.cuda.set_sync_debug_mode, "default")
            self._begin()
            yield self

    def begin(self, name: str) -> None:
        """Begin a phase; what was done since the last one ended belongs to it."""
        self.now.append(name)

    def end(self) -> None:
        """End the innermost phase."""
        name = self.now.pop()
        self.gpu.counting(False)
        self.phases.append(self._measured(name))
        self._begin()

    def _begin(self) -> None:
        self._waits.clear()
        self._began = time.monotonic()
        torch.cuda.reset_peak_memory_stats()
        self.gpu.clear()
        self.gpu.counting(True)

    def _measured(self, name: str) -> Measured:
        counts = self.gpu.counts()

        def copies(kind: str) -> tuple[int, int]:
            made = [count for count in counts if count.kind == kind]
            return sum(c.times for c in made), sum(c.a * c.times for c in made)

        return Measured(
            phase=name,
            seconds=time.monotonic() - self._began,
            allocated=torch.cuda.memory_allocated(),
            peak=torch.cuda.max_memory_allocated(),
            reserved=torch.cuda.memory_reserved(),
            reserved_peak=torch.cuda.max_memory_reserved(),
            free=self.gpu.num_bytes("free"),
            pinned=self.gpu.num_bytes("pinned_peak"),
            rss=psutil.Process().memory_info().rss,
            launches=sum(count.times for count in counts if count.kind == "K"),
            flops=self.gpu.flops(),
            device_waits=sum(count.times for count in counts if count.kind == "S"),
            to_device=copies("H"),
            to_host=copies("D"),
            collectives=self._collectives([count for count in counts if count.kind == "N"]),
            waits=dict(self._waits.most_common()),
        )

    def _collectives(self, counts: list[Any]) -> dict[tuple[str, str], tuple[int, int]]:
        names, communicators = self._group_names(), self.gpu.communicators()
        number: Counter[tuple[str, str]] = Counter()
        size: Counter[tuple[str, str]] = Counter()
        for count in counts:
            kind = KINDS.get(count.name, count.name)
            group = communicators[count.b]
            key = kind, names.get(group, group)
            # NCCL is told the smaller side of these two.
            factor = count.c if kind in ("all_gather", "reduce_scatter") else 1
            number[key] += count.times
            size[key] += count.times * count.a * factor
        return {key: (number[key], size[key]) for key in sorted(number)}

    def _group_names(self) -> dict[str, str]:
        if self.context is None:
            return {}
        # Two interleaved stages send one way in the group of all ranks.
        named = {dist.group.WORLD.group_name: "pp" if self.context.layout.pipeline > 1 else "world"}  # type: ignore[union-attr]
        for name in _GROUPS.split():
            group = getattr(self.context.groups, name, None)
            if isinstance(group, dist.ProcessGroup):
                named[group.group_name] = name
        return named

    def _warned(self, message: Any, category: Any, *rest: Any, **options: Any) -> None:
        if "synchroniz" in str(message):
            self._note()

    def _noting(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def wait(*args: Any, **options: Any) -> Any:
            self._note()
            return real(*args, **options)

        return wait

    def _note(self) -> None:
        self._waits[_place()] += 1


def _place() -> str:
    """Return file and line of the innermost caller in this package or in Megatron-Core."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT / "megatron_hdpo"):
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
        if "megatron/core" in frame.filename:
            return f"megatron/core{frame.filename.rpartition('megatron/core')[2]}:{frame.lineno}"
    return "elsewhere"


def peak_rss() -> int:
    """Return the most bytes of memory that this process had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class MeasuringConsole(Console):
    """Silent console whose phases are measured."""

    def __init__(self, meter: Meter) -> None:
        super().__init__(enabled=False, tick_s=None)
        self.meter = meter

    @contextmanager
    def phase(self, name: str, total: float | None = None, unit: str = "item") -> Iterator[Phase]:
        """Measure the block; a phase that fails is left in `meter.now`."""
        self.meter.begin(name)
        with super().phase(name, total, unit) as phase:
            yield phase
        self.meter.end()
