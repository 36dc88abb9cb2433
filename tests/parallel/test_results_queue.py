"""The process that keeps the results of a rank's checkpoint writers is the rank's, and ends with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil

RANK = """
if __name__ == "__main__":
    import multiprocessing
    import time
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron_hdpo.parallel.results_queue import start_results_queue

    start_results_queue()
    start_results_queue()
    module = vars(filesystem_async)  # the name is public from Megatron-Core 0.17 on
    queue = (module.get("get_write_results_queue") or module["_get_write_results_queue"])()
    queue.put("written")
    (keeper,) = multiprocessing.active_children()
    print(queue.get(), keeper.pid, flush=True)
    time.sleep(60)
"""


def test_it_ends_with_a_rank_that_is_killed(tmp_path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    rank = subprocess.Popen([sys.executable, tmp_path / "rank.py"], stdout=subprocess.PIPE, text=True)
    try:
        assert rank.stdout is not None
        word, pid = rank.stdout.readline().split()
        keeper = psutil.Process(int(pid))
        assert (word, keeper.ppid()) == ("written", rank.pid)
    finally:
        os.kill(rank.pid, signal.SIGKILL)
        rank.wait()
    keeper.wait(timeout=10)  # raises if it is still there
