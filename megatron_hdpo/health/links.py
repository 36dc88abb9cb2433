"""Speed of devices and links: one slow device or link slows every rank."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megatron_hdpo.health.findings import CheckResult, named
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.parallel.location import RankLocation

_BYTES = {"cuda": 256 * 2**20, "cpu": 2 * 2**20}
_MATRIX = {"cuda": 8192, "cpu": 256}
_TRIES = {"cuda": 5, "cpu": 30}


def matmul_seconds(device: torch.device) -> float:
    """Return the seconds of one matrix product on this rank's device: the best of several, as noise only adds time."""
    size, dtype = _MATRIX[device.type], torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    return min(_timed(lambda: torch.mm(left, right), device) for _ in range(_TRIES[device.type]))


def check_devices(
    context: ParallelContext, locations: Sequence[RankLocation], own_seconds: float, slow_ratio: float
) -> CheckResult:
    """Compare the ranks' `matmul_seconds`; warn of slow devices. Collective.

    own_seconds: of this rank. slow_ratio: multiple of the median from which a device is slow.
    """
    seconds = context.gather_objects(own_seconds)
    median = statistics.median(seconds)
    ratios = [own / median for own in seconds]
    slow = [location for location, ratio in zip(locations, ratios, strict=True) if ratio > slow_ratio]
    warnings = []
    if slow:
        warnings = [
            f"slow devices: a matrix product takes up to {max(ratios):.1f} x the median of all ranks on {named(slow)}; "
            "all other ranks wait for these (heat, a power limit, or another process?)"
        ]
    metrics = {"health/matmul_ms_median": median * 1e3}
    if len(locations) > 1:
        metrics["health/matmul_slowest_ratio"] = max(ratios)
    return CheckResult(metrics, warnings=warnings)


def allreduce_gb_per_s(context: ParallelContext, group: dist.ProcessGroup | None = None) -> float:
    """Return the bus bandwidth of an all-reduce over a group (default: all ranks). Collective over the group.

    Computed as nccl-tests does, 2 (n - 1) / n x bytes / seconds: the bandwidth of the slowest link, for any number of
    ranks.
    """
    size, device = dist.get_world_size(group), context.device
    numbers = torch.ones(_BYTES[device.type] // 4, device=device, dtype=torch.float32)
    dist.all_reduce(numbers, group=group)  # the first call opens the connections

    def reduce() -> None:
        dist.all_reduce(numbers, group=group)

    seconds = min(_timed(reduce, device) for _ in range(_TRIES[device.type]))
    return 2 * (size - 1) / size * numbers.nbytes / seconds / 1e9


def check_links(context: ParallelContext, locations: Sequence[RankLocation], min_gb_per_s: float | None) -> CheckResult:
    """Measure an all-reduce over all ranks and, with several nodes, inside each node. Collective.

    Returns an empty CheckResult for one rank.
    """
    if len(locations) == 1:
        return CheckResult()
    everywhere = max(context.gather_objects(allreduce_gb_per_s(context)))
    finding = CheckResult({"health/allreduce_gb_per_s": everywhere})
    nodes = ranks_of_nodes(locations)
    if len(nodes) > 1 and max(map(len, nodes)) > 1:
        finding.add(_check_nodes(context, locations, nodes))
    if min_gb_per_s is not None and everywhere < min_gb_per_s:
        finding.problems.append(
            f"an all-reduce over all {len(locations)} ranks runs at {everywhere:.3g} GB/s, "
            f"health.min_allreduce_gb_per_s is {min_gb_per_s:g}: does it use the right network (NCCL_DEBUG=INFO shows "
            "which one it uses)?"
        )
    return finding


def ranks_of_nodes(locations: Sequence[RankLocation]) -> list[list[int]]:
    """Return the ranks of each node, in rank order."""
    nodes: dict[int, list[int]] = {}
    for location in locations:
        nodes.setdefault(location.node, []).append(location.rank)
    return list(nodes.values())


def _check_nodes(context: ParallelContext, locations: Sequence[RankLocation], nodes: list[list[int]]) -> CheckResult:
    group, groups = dist.new_subgroups_by_enumeration(nodes)
    own = allreduce_gb_per_s(context, group) if dist.get_world_size(group) > 1 else None
    speeds = {
        location: gb for location, gb in zip(locations, context.gather_objects(own), strict=True) if gb is not None
    }
    for used in groups:
        if used is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(used)
    worst = min(speeds, key=lambda location: speeds[location])
    median = statistics.median(speeds.values())
    warnings = []
    if speeds[worst] < median / 2:
        warnings = [
            f"slow links inside a node: an all-reduce runs at {speeds[worst]:.3g} GB/s on {worst.host}, at "
            f"{median:.3g} GB/s on the median node"
        ]
    return CheckResult({"health/allreduce_node_gb_per_s_min": speeds[worst]}, warnings=warnings)


def _timed(work: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
