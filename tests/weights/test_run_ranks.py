"""The helper that every distributed test rests on: results in order, failures by rank, no rank that hangs the suite."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_helper import run_ranks


def _sum_of_ranks(offset: int) -> tuple[int, float]:
    dist.init_process_group("gloo")
    value = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(value)
    return dist.get_rank(), float(value)


def _fail_on_rank_one() -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        raise ValueError("rank one has a reason")
    dist.barrier()


def _hang(record: Path) -> None:
    if os.environ["RANK"] == "1":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        record.write_text(f"{os.getpid()} {child.pid}")
        time.sleep(60)


def _ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_results_come_in_rank_order() -> None:
    assert run_ranks(2, _sum_of_ranks, 10) == [(0, 21.0), (1, 21.0)]


def test_a_failure_names_its_rank_while_others_wait() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1 of 2 failed.*rank one has a reason"):
        run_ranks(2, _fail_on_rank_one)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_a_rank_that_hangs_is_named_and_ends_with_what_it_started(tmp_path: Path) -> None:
    run_ranks(1, os.getpid)  # the server that ranks are forked from has its imports behind it
    with pytest.raises(AssertionError, match=r"ranks \[1\] of 2 had not returned after 8"):
        run_ranks(2, _hang, tmp_path / "pids", timeout=8)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    deadline = time.monotonic() + 10
    while not all(map(_ended, pids)):
        assert time.monotonic() < deadline, f"{pids} still run"
        time.sleep(0.05)
