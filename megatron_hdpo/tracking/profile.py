"""Traces of chosen steps and ranks by torch's profiler, for chrome://tracing or Perfetto."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch.profiler import ProfilerActivity, profile

from megatron_hdpo.tracking.console import Console

_SNAPSHOT_ENTRIES = 200_000


class ProfileConfig(BaseModel):
    """What is recorded beside the metrics that every step has, and what MFU is measured against."""

    model_config = ConfigDict(extra="forbid")

    steps: list[int] = Field(
        default_factory=list, description="Steps that are traced, counted from 1 as in metrics.jsonl. Default: none."
    )
    ranks: list[int] = Field(default_factory=lambda: [0], description="Ranks that write a trace of those steps.")
    record_shapes: bool = Field(False, description="Shapes of every operator's inputs in the trace.")
    with_stack: bool = Field(False, description="Python source lines in the trace; makes it several times as large.")
    memory: bool = Field(
        False, description="Allocations in the trace; on a GPU also a snapshot for pytorch.org/memory_viz."
    )
    peak_tflops: float | None = Field(
        None,
        gt=0,
        description="Peak of one device in TFLOP/s, for MFU; default: the dense bf16 peak where the device is known.",
    )

    def errors(self, world_size: int, steps: int) -> Iterator[str]:
        """Why these steps or ranks cannot be traced, by key."""
        if wrong := [step for step in self.steps if not 1 <= step <= steps]:
            yield f"profile.steps: {wrong[0]}: the run has steps 1 to {steps} (train.steps)"
        if wrong := [rank for rank in self.ranks if not 0 <= rank < world_size]:
            yield f"profile.ranks: {wrong[0]}: the run has ranks 0 to {world_size - 1}"


class StepProfiler:
    """Writes `<folder>/step_<step>_rank_<rank>.json.gz` of the recipe's steps on the recipe's ranks."""

    def __init__(self, config: ProfileConfig, folder: Path, rank: int, device: torch.device, console: Console) -> None:
        self.config, self.folder, self.rank, self.device, self.console = config, folder, rank, device, console

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
        """The allocator's history as `<path>_memory.pickle`, GPU only. Written from torch's documentation: no GPU has
        run it yet."""
        if not self.config.memory or self.device.type != "cuda":
            yield
            return
        torch.cuda.memory._record_memory_history(max_entries=_SNAPSHOT_ENTRIES)
        try:
            yield
            torch.cuda.memory._dump_snapshot(f"{path}_memory.pickle")
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)
