"""Checkpoints are written by threads: no process is forked from a rank that has threads, and no error is lost."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import torch
from distributed_helper import run_ranks
from tiny_policy import joined

from megatron_hdpo.weights.sharded_writer import write_sharded


def sharded(rank: int) -> dict[str, Any]:
    """Two numbers of this rank among four; an object beside them."""
    from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor

    own = torch.arange(2.0) + 10 * rank
    return {
        "weight": ShardedTensor.from_rank_offsets("weight", own, (0, rank, 2)),
        "more": ShardedTensor.from_rank_offsets("more", own + 100, (0, rank, 2)),
        "notes": ShardedObject("notes", {"of": rank}, (2,), (rank,)),
    }


def write_without_processes(folder: Path) -> tuple[list[str], list[float]]:
    """What was done in which order, and the tensor that is read again; a process that is started fails."""
    import multiprocessing.process

    from megatron.core import dist_checkpointing

    def refused(*args: Any) -> None:
        raise AssertionError("a process was started")

    with joined(tensor=2) as context:
        os.fork = refused  # type: ignore
        multiprocessing.process.BaseProcess.start = refused  # type: ignore
        done: list[str] = []
        for turn in ("first", "second"):
            if context.is_leader:
                (folder / turn).mkdir(parents=True)
            context.barrier("folder made")
            with context.megatron_calls():
                write_sharded(sharded(context.rank), folder / turn, lambda: done.append("written"))
                done.append("described" if (folder / turn / ".metadata").exists() else "lost")
                state = sharded(context.rank)
                state["weight"].data = torch.zeros(2)
                read = dist_checkpointing.load(state, str(folder / turn))
        return done, read["weight"].tolist()


def test_no_process_is_started(tmp_path: Path) -> None:
    seen = run_ranks(2, write_without_processes, tmp_path, fresh=True)
    assert [read for _, read in seen] == [[0.0, 1.0], [10.0, 11.0]]
    assert all(done == ["written", "described"] * 2 for done, _ in seen)


def write_on_a_full_disk(folder: Path) -> str:
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from torch.distributed.checkpoint.api import CheckpointException

    original = filesystem_async._write_item

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with joined(tensor=2) as context:
        if context.is_leader:
            folder.mkdir()
        context.barrier("folder made")
        filesystem_async._write_item = full if context.rank == 1 else original
        try:
            with context.megatron_calls():
                write_sharded(sharded(context.rank), folder, lambda: None)
        except CheckpointException as error:
            return str(error)
        return "written"


def test_an_error_of_one_rank_is_one_of_all(tmp_path: Path) -> None:
    errors = run_ranks(2, write_on_a_full_disk, tmp_path / "full", fresh=True)
    assert "written" not in errors and "No space left on device" in errors[0]
    assert not (tmp_path / "full" / ".metadata").exists()
