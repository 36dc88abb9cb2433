"""Checks of ranks, machines and links before step 0, cheap ones first."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_hdpo.health.config import HealthConfig
from megatron_hdpo.health.findings import CheckResult, HealthError
from megatron_hdpo.health.links import check_devices, check_links, matmul_seconds
from megatron_hdpo.health.machines import (
    check_clocks,
    check_disk,
    check_gpu_memory,
    check_shared_folder,
    free_gpu_share,
)
from megatron_hdpo.health.versions import check_versions, versions_here
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.parallel.location import RankLocation, locate_rank
from megatron_hdpo.tracking.console import Console
from megatron_hdpo.tracking.formats import amount


def check_health(
    config: HealthConfig, context: ParallelContext, console: Console, folder: Path, recipe_json: str
) -> dict[str, float]:
    """Check ranks, machines and links; return `health/...` metrics.

    Collective. Warnings and a one-line summary go to the console. folder: the run's folder. recipe_json: the recipe,
    which must be the same on every rank. Returns {} when `config.enabled` is false. Raises HealthError, on every rank
    and with every reason, when the run should not start.
    """
    if not config.enabled:
        return {}
    locations = context.gather_objects(locate_rank(context.rank, context.is_replica_leader))
    with console.phase("health checks"):
        found = CheckResult()
        digest = hashlib.sha256(recipe_json.encode()).hexdigest()[:12]
        found.add(check_versions(context, locations, versions_here(digest)))
        found.add(check_clocks(context, locations, config.max_clock_offset_s))
        found.add(check_shared_folder(context, locations, folder, config.shared_folder_timeout_s))
        found.add(check_disk(context, locations, folder, config.min_free_disk_gb))
        found.add(check_gpu_memory(context, locations, free_gpu_share(context.device), config.min_free_gpu_share))
        _stop_at(found)
        found.add(check_devices(context, locations, matmul_seconds(context.device), config.slow_device_ratio))
        found.add(check_links(context, locations, config.min_allreduce_gb_per_s))
        _stop_at(found)
    for warning in found.warnings:
        console.warn(warning)
    console.print(summary(locations, found.metrics))
    return found.metrics


def summary(locations: Sequence[RankLocation], metrics: Mapping[str, float]) -> str:
    """Return the line that the console shows for the health metrics of a run."""
    nodes = len({location.node for location in locations})
    parts = [f"{len(locations)} ranks on {amount(nodes, 'node')} agree"] if len(locations) > 1 else []
    if len(locations) > 1:
        parts.append(f"clocks within {metrics['health/clock_offset_s']:.3f} s")
        parts.append(f"slowest device {metrics['health/matmul_slowest_ratio']:.2f} x the median")
        inside = metrics.get("health/allreduce_node_gb_per_s_min")
        within = "" if inside is None else f" ({inside:.3g} inside the slowest node)"
        parts.append(f"all-reduce {metrics['health/allreduce_gb_per_s']:.3g} GB/s{within}")
    if "health/free_gpu_share_min" in metrics:
        parts.append(f"{metrics['health/free_gpu_share_min']:.0%} of GPU memory free at least")
    return "health: " + ", ".join([*parts, f"{metrics['health/free_disk_gb']:,.0f} GB of disk free"])


def _stop_at(found: CheckResult) -> None:
    if found.problems:
        raise HealthError("\n".join(found.problems))
