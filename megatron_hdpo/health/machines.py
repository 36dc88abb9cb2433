"""Checks of clocks, of the run folder and of GPU memory."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megatron_hdpo.health.findings import CheckResult, named
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.parallel.location import RankLocation

_ROUNDS = 5
_GB = 1e9


def check_clocks(
    context: ParallelContext, locations: Sequence[RankLocation], limit_s: float, clock: Callable[[], float] = time.time
) -> CheckResult:
    """Compare every rank's clock (Unix seconds) with rank 0's. Collective.

    All ranks read their clocks right after a barrier. A late reading looks like an offset, so the smallest offset of
    several rounds counts: a clock that is wrong is wrong in all rounds.
    """
    rounds = []
    for _ in range(_ROUNDS):
        context.barrier("clocks")
        rounds.append(context.gather_objects(clock()))
    offsets = [min((read[i] - read[0] for read in rounds), key=abs) for i in range(len(locations))]
    worst = max(offsets, key=abs)
    off = [(location, offset) for location, offset in zip(locations, offsets, strict=True) if abs(offset) > limit_s]
    problems = []
    if off:
        location, offset = max(off, key=lambda pair: abs(pair[1]))
        problems = [
            f"the clock of {location} is {abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} that of "
            f"{locations[0]} (health.max_clock_offset_s: {limit_s:g}); clocks to correct: "
            f"{named([location for location, _ in off])}: synchronise them with a time service such as chrony"
        ]
    return CheckResult({"health/clock_offset_s": abs(worst)}, problems)


def check_shared_folder(
    context: ParallelContext, locations: Sequence[RankLocation], folder: Path, timeout_s: float
) -> CheckResult:
    """Check that every rank sees, within `timeout_s`, a file that rank 0 writes into the run folder. Collective."""
    token = uuid.uuid4().hex if context.is_leader else ""
    if context.is_leader:
        (folder / f".seen-by-all-{token}").write_text(token)
    token = context.broadcast_object(token)
    path = folder / f".seen-by-all-{token}"
    deadline = time.monotonic() + timeout_s
    while not (seen := path.is_file()) and time.monotonic() < deadline:
        time.sleep(0.1)
    everyone = context.gather_objects(seen)
    if context.is_leader:
        path.unlink(missing_ok=True)
    blind = [location for location, saw in zip(locations, everyone, strict=True) if not saw]
    if not blind:
        return CheckResult()
    return CheckResult(
        problems=[
            f"output: {folder} is not shared by all ranks: {named(blind)} did not see a file of {locations[0]} within "
            f"{timeout_s:g} s: use the absolute path of a folder on a file system that all nodes mount"
        ]
    )


def check_disk(
    context: ParallelContext, locations: Sequence[RankLocation], folder: Path, min_free_gb: float
) -> CheckResult:
    """Check the free space for checkpoints, rollouts and logs, as rank 0 sees it. Collective."""
    free_gb = context.broadcast_object(shutil.disk_usage(folder).free / _GB if context.is_leader else 0.0)
    problems = []
    if free_gb < min_free_gb:
        problems = [
            f"output: {folder} has {free_gb:.1f} GB of free space on {locations[0]}, health.min_free_disk_gb is "
            f"{min_free_gb:g}: free some space, or use another folder"
        ]
    return CheckResult({"health/free_disk_gb": free_gb}, problems)


def free_gpu_share(device: torch.device) -> float:
    """Return the free share of the device's memory, counting all processes; 1 on a CPU."""
    if device.type != "cuda":
        return 1.0
    free, total = torch.cuda.mem_get_info(device)
    return free / total


def check_gpu_memory(
    context: ParallelContext, locations: Sequence[RankLocation], own_share: float, min_free_share: float
) -> CheckResult:
    """Check that no other process holds memory of the GPUs. Collective.

    own_share: `free_gpu_share` of this rank. min_free_share: smallest share allowed.
    """
    shares = context.gather_objects(own_share)
    taken = [location for location, share in zip(locations, shares, strict=True) if share < min_free_share]
    metrics = {"health/free_gpu_share_min": min(shares)} if context.device.type == "cuda" else {}
    if not taken:
        return CheckResult(metrics)
    return CheckResult(
        metrics,
        [
            f"the GPUs of {named(taken)} are not free: the worst has {min(shares):.0%} of its memory left before "
            f"anything is loaded, health.min_free_gpu_share is {min_free_share:g}: stop the other processes there "
            "(nvidia-smi lists them)"
        ],
    )
