"""The ranks of a run: who is where, host-side exchange, and a barrier that names who is missing."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from distributed_helper import leave_layout, run_ranks

from megatron_hdpo.parallel.context import ParallelContext, start
from megatron_hdpo.parallel.late import Patience
from megatron_hdpo.parallel.layout import ParallelConfig
from megatron_hdpo.parallel.meetings import Meetings, RankError

MISSING = 2


def _places(context: ParallelContext) -> dict[str, Any]:
    return {
        "leader": context.is_leader,
        "stages": (context.is_first_stage, context.is_last_stage),
        "dp": (context.dp_rank, context.dp_size),
        "replica": context.replica_ranks,
        "gathered": context.gather_objects(context.rank * 10),
        "in_replica": context.gather_objects(context.rank * 10, context.replica_host),
        "from_last": context.broadcast_object(context.rank, source=3),
        "from_second_of_replica": context.broadcast_object(context.rank, context.replica_host, source=1),
    }


def _visit(folder: Path) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for name, layout in (("tp2", {"tensor": 2}), ("pp2", {"pipeline": 2})):
        context = start(ParallelConfig(timeout_minutes=2.0, **layout), device="cpu")
        seen[name] = _places(context)
        context.barrier("everybody is here")
        if name != "pp2":
            leave_layout()
    # The groups were made with patience; only the barrier is in a hurry.
    store = dist.distributed_c10d._get_default_store()
    context = replace(context, meetings=Meetings(store, context.host, Patience(2.0, 60.0)))
    seen["barrier"] = _wait_in_vain(context, folder)
    return seen


def _wait_in_vain(context: ParallelContext, folder: Path) -> str | None:
    """The text of the barrier's error; the missing rank stays alive until the others have theirs."""
    text, deadline = None, time.monotonic() + 60
    if context.rank != MISSING:
        try:
            context.barrier("the end of step 7")
        except RankError as error:
            text = str(error)
        (folder / str(context.rank)).touch()
    while len(list(folder.iterdir())) < context.world_size - 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    return text


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(4, _visit, tmp_path_factory.mktemp("barrier"))


def test_places_at_tensor_parallel_two(ranks) -> None:
    for rank, seen in enumerate(ranks):
        mine = [0, 1] if rank < 2 else [2, 3]
        assert seen["tp2"] == {
            "leader": rank == 0,
            "stages": (True, True),
            "dp": (rank // 2, 2),
            "replica": mine,
            "gathered": [0, 10, 20, 30],
            "in_replica": [10 * r for r in mine],
            "from_last": 3,
            "from_second_of_replica": mine[1],
        }


def test_places_at_pipeline_parallel_two(ranks) -> None:
    for rank, seen in enumerate(ranks):
        mine = [0, 2] if rank % 2 == 0 else [1, 3]
        assert seen["pp2"]["stages"] == (rank < 2, rank >= 2)
        assert seen["pp2"]["dp"] == (rank % 2, 2)
        assert seen["pp2"]["replica"] == mine
        assert seen["pp2"]["in_replica"] == [10 * r for r in mine]
        assert seen["pp2"]["from_second_of_replica"] == mine[1]


@pytest.mark.fault(
    "a rank does not come to a barrier",
    phase="all",
    seen="one line that names the rank",
    lost="the steps since the last checkpoint",
)
def test_the_barrier_names_the_rank_that_is_missing(ranks) -> None:
    assert ranks[MISSING]["barrier"] is None
    for rank in (0, 1, 3):
        assert f"while ranks waited for 'the end of step 7': rank {MISSING} on " in ranks[rank]["barrier"]
