"""Traces of chosen steps and ranks by torch's profiler, for chrome://tracing or Perfetto."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_hdpo.tracking.config import ProfileConfig
from megatron_hdpo.tracking.console import Console

_SNAPSHOT_ENTRIES = 200_000


class StepProfiler:
    """Writer of `<folder>/step_<step>_rank_<rank>.json.gz` for the recipe's steps on the recipe's ranks."""

    def __init__(self, config: ProfileConfig, folder: Path, rank: int, device: torch.device, console: Console) -> None:
        self.config, self.folder, self.rank, self.device, self.console = config, folder, rank, device, console
        console.timer.mark = record_function  # the names of phases in a trace

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Trace the block where this step and rank are chosen. A step that fails leaves no trace."""
        if step not in self.config.steps or self.rank not in self.config.ranks:
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step_{step:08d}_rank_{self.rank:05d}"
        with self._memory_history(path), self._profile() as trace:
            yield
        with self.console.phase("write trace"):
            trace.export_chrome_trace(f"{path}.json.gz")

    def _profile(self) -> profile:
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])
        return profile(
            activities=activities,
            record_shapes=self.config.record_shapes,
            with_stack=self.config.with_stack,
            profile_memory=self.config.memory,
        )

    @contextmanager
    def _memory_history(self, path: Path) -> Iterator[None]:
        """Write the allocator's history as `<path>_memory.pickle`, GPU only.

        Written from torch's documentation: no GPU has run it yet.
        """
        if not self.config.memory or self.device.type != "cuda":
            yield
            return
        torch.cuda.memory._record_memory_history(max_entries=_SNAPSHOT_ENTRIES)
        try:
            yield
            torch.cuda.memory._dump_snapshot(f"{path}_memory.pickle")
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)
