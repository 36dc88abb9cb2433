"""What the ranks of the health tests do: every check once as it should be, and once with a fault on one rank."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path
from typing import Any

from tiny_policy import ONE_PER_MICRO_BATCH, OPTIMIZER, SPEC, build_policy, make_examples, make_scorings

from megatron_hdpo.health.check import check_health
from megatron_hdpo.health.config import HealthConfig
from megatron_hdpo.health.findings import HealthError
from megatron_hdpo.health.links import check_devices, check_links, matmul_seconds
from megatron_hdpo.health.machines import check_clocks, check_disk, check_gpu_memory, check_shared_folder
from megatron_hdpo.health.stragglers import ComputeClock, StragglerWatch
from megatron_hdpo.health.versions import check_versions, versions_here
from megatron_hdpo.parallel.context import ParallelContext, start
from megatron_hdpo.parallel.layout import ParallelConfig
from megatron_hdpo.parallel.location import RankLocation
from megatron_hdpo.tracking.console import Console


def visit(folder: str) -> dict[str, Any]:
    """Every check, without and with a fault on the last rank."""
    context = start(ParallelConfig(timeout_minutes=1.0), "cpu")
    last = context.rank == context.world_size - 1
    # Two ranks to a node, with names that no machine here has.
    locations = [RankLocation(rank, rank % 2, f"host{rank // 2}") for rank in range(context.world_size)]
    shared, own = Path(folder) / "shared", Path(folder) / f"of-rank-{context.rank}"
    for path in (shared, own):
        path.mkdir(parents=True, exist_ok=True)
    versions = versions_here("digest")
    odd = versions | ({"torch": "0.0.1", "NCCL": "9.9"} if last else {})
    seen = {
        "versions": check_versions(context, locations, versions),
        "odd versions": check_versions(context, locations, odd),
        "clocks": check_clocks(context, locations, 2.0),
        "fast clock": check_clocks(context, locations, 2.0, lambda: time.time() + (60.0 if last else 0.0)),
        "slow clock": check_clocks(context, locations, 2.0, lambda: time.time() - (60.0 if last else 0.0)),
        "folder": check_shared_folder(context, locations, shared, 10.0),
        "own folder": check_shared_folder(context, locations, own if last else shared, 0.5),
        "left in the folder": [path.name for path in shared.iterdir()],
        "disk": check_disk(context, locations, shared, 0.0),
        "full disk": check_disk(context, locations, shared, 1e9),
        "memory": check_gpu_memory(context, locations, 1.0, 0.8),
        "used memory": check_gpu_memory(context, locations, 0.25 if last else 1.0, 0.8),
        "devices": check_devices(context, locations, 0.010, 1.3),
        "slow device": check_devices(context, locations, 0.030 if last else 0.010, 1.3),
        "matmul": matmul_seconds(context.device),
        "links": check_links(context, locations, None),
        "slow links": check_links(context, locations, 1e6),
    }
    return seen | _whole(context, shared)


def _whole(context: ParallelContext, folder: Path) -> dict[str, Any]:
    stream = io.StringIO()
    console = Console(context.is_leader, stream=stream)
    seen: dict[str, Any] = {"metrics": check_health(HealthConfig(), context, console, folder, "{}")}
    seen["off"] = check_health(HealthConfig(enabled=False), context, console, folder, "{}")
    recipe = "{}" if context.rank != 1 else '{"seed": 1}'
    try:
        check_health(HealthConfig(min_free_disk_gb=1e9), context, console, folder, recipe)
    except HealthError as error:
        seen["error"] = str(error)
    return seen | {"console": stream.getvalue()}


def watch(checkpoint: str, steps: int, first_gb_per_s: float) -> dict[str, Any]:
    """Run real updates of a tiny policy on replicas; from the second step on rank 1 dawdles in its forward passes.

    Time is counted in forward passes: one takes 1 s, and 1.5 s where the rank dawdles, however busy the machine is.
    """
    context = start(ParallelConfig(timeout_minutes=1.0), "cpu")
    policy = build_policy(Path(checkpoint), context, budget=ONE_PER_MICRO_BATCH, optimizer=OPTIMIZER)
    stream = io.StringIO()
    config = HealthConfig(straggler_steps=2, straggler_ratio=1.05, every=steps)
    now, dawdle = [0.0], [0.0]
    console = Console(context.is_leader, stream=stream)
    stragglers = StragglerWatch(
        config, context, console, policy, first_gb_per_s=first_gb_per_s, host_seconds=lambda: now[0]
    )
    clock = ComputeClock(context.device, lambda: now[0])
    clock.attach(policy)

    def take_time(*_: Any) -> None:
        now[0] += 1.0 + dawdle[0]

    policy.model.register_forward_pre_hook(take_time)
    seen: dict[str, Any] = {"metrics": [], "seconds": []}
    for step in range(1, steps + 1):
        dawdle[0] = 0.5 if context.rank == 1 and step > 1 else 0.0
        policy.score(make_scorings()[:2])
        seen["scoring"] = clock.seconds()
        policy.update(make_examples()[context.rank :: context.world_size], SPEC)
        seen["seconds"].append(clock.seconds())
        seen["metrics"].append(stragglers.metrics(step))
    return seen | {"console": stream.getvalue()}


def train_with_own_seed(recipe: str) -> None:
    """The command line with an override that only this rank has."""
    from megatron_hdpo.cli import main

    main(["train", recipe, f"seed={os.environ['RANK']}"])
