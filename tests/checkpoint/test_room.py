"""A checkpoint is begun only when the disk can take it."""

from __future__ import annotations

import math
import os
import resource
import signal
from pathlib import Path

import pytest
from distributed_helper import run_ranks
from tiny_policy import OPTIMIZER, build_policy, joined, make_checkpoint

from megatron_hdpo.checkpoint import room
from megatron_hdpo.checkpoint.store import CheckpointStore, NoRoomError
from megatron_hdpo.weights.stored import read_tensors


def save_with_free(share: float, model: Path, run: Path, layout: dict[str, int]) -> tuple[str, int, int]:
    """Save where there is room for a share of the tensors; the error, the tensors' bytes, and the folders then."""
    with joined(**layout) as context:
        policy = build_policy(model, context, optimizer=OPTIMIZER)
        store = CheckpointStore(run, context, keep=1)
        stored = read_tensors(store.save(1, policy)).values()
        bytes_ = sum(math.prod(tensor.global_shape) * tensor.dtype.itemsize for tensor in stored)
        room.free_bytes = lambda folder: room.RESERVE_BYTES + round(share * bytes_)
        error = ""
        try:
            store.save(2, policy)
        except NoRoomError as refused:
            error = str(refused)
        return error, bytes_, len(list(run.glob("checkpoints/*")))


@pytest.mark.parametrize("layout", [{}, {"tensor": 2}, {"pipeline": 2}])
def test_the_bytes_of_all_ranks_are_needed_once(layout: dict[str, int], tmp_path: Path) -> None:
    model = make_checkpoint("qwen2", tmp_path / "model")
    for name, share, fits in (("enough", 1.0, True), ("too little", 0.99, False)):
        for error, bytes_, folders in run_ranks(2, save_with_free, share, model, tmp_path / name, layout, fresh=True):
            assert bytes_ > 10_000 and folders == 1
            assert (error == "") == fits, error
            assert fits or "step 2 is not saved: " in error


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "no permission" in room._problem(tmp_path, 1) or "denied" in room._problem(tmp_path / "x", 1)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert room._problem(tmp_path / "file" / "checkpoints", 1)


def save_beyond_a_limit(model: Path, run: Path) -> tuple[str, list[str], int]:
    """Save where rank 1 may write no large file; the error, the folders then, and a later save without a limit."""
    with joined(pipeline=2) as context:
        policy = build_policy(model, context, optimizer=OPTIMIZER)
        store = CheckpointStore(run, context, keep=3)
        store.save(1, policy)
        if context.rank == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        error = ""
        try:
            store.save(2, policy)
        except NoRoomError as refused:
            error = str(refused)
        context.barrier("refused")
        folders = sorted(path.name for path in run.glob("checkpoints/*"))
        if context.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        context.barrier("looked at")
        return error, folders, int(store.save(3, policy).name[-1])


@pytest.mark.fault(
    "the disk is full, or a quota is reached, amid the files of a checkpoint",
    phase="saving",
    seen="`step ... is not saved`, at each step until it is",
    lost="nothing",
)
def test_a_disk_that_is_full_amid_a_checkpoint(tmp_path: Path) -> None:
    """A limit on the size of files stands for it: the system writes a part of the file and refuses the rest."""
    model = make_checkpoint("qwen2", tmp_path / "model")
    for error, folders, saved in run_ranks(2, save_beyond_a_limit, model, tmp_path / "run", fresh=True):
        assert error.startswith("step 2 is not saved: ") and "File too large" in error, error
        assert folders == ["step_00000001"] and saved == 3
