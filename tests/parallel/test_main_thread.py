"""What the main thread does, seen by another thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from traceback import StackSummary

import torch
import torch.distributed as dist
from distributed_helper import run_ranks

from megatron_hdpo.parallel import main_thread
from megatron_hdpo.parallel.context import start
from megatron_hdpo.parallel.layout import ParallelConfig


def seen_during(work: Callable[[], object]) -> StackSummary:
    """The stack of the main thread a moment after `work` has begun."""
    found: list[StackSummary] = []
    timer = threading.Timer(0.2, lambda: found.append(main_thread.main_thread_stack()))
    timer.start()
    work()
    timer.join()
    return found[0]


def waits_of_rank_0() -> list[bool]:
    """Whether rank 0 is seen to wait while rank 1 is late in a collective, in a wait for one, and in a receive."""
    host, seen = start(ParallelConfig(), "cpu").host, []

    def handle() -> None:
        work = dist.all_reduce(torch.ones(1), group=host, async_op=True)
        assert work is not None
        work.wait()

    def message() -> None:
        if dist.get_rank() == 0:
            dist.recv(torch.ones(1), 1)
        else:
            dist.send(torch.ones(1), 0)

    for collective in (lambda: dist.barrier(host), handle, message):
        if dist.get_rank() == 1:
            time.sleep(1.0)
            collective()
        else:
            seen.append(main_thread.waits_for_ranks(seen_during(collective)))
    return seen


def test_a_rank_that_waits_in_a_collective_is_seen_to_wait() -> None:
    assert run_ranks(2, waits_of_rank_0)[0] == [True, True, True]


def test_work_sleep_and_waits_for_threads_are_no_waits_for_ranks() -> None:
    event = threading.Event()

    def sleep() -> None:
        time.sleep(0.5)

    def wait() -> None:
        event.wait(0.5)

    for work in (sleep, wait):
        assert not main_thread.waits_for_ranks(seen_during(work))


def test_the_place_is_the_innermost_line_of_this_package() -> None:
    package = Path(main_thread.__file__).parents[1]
    calls = [(package / "cli.py", 2, "main"), (package / "model/policy.py", 7, "update"), ("/torch/adam.py", 9, "step")]
    stack = StackSummary.from_list([(str(file), line, name, "") for file, line, name in calls])
    assert main_thread.place(stack) == "megatron_hdpo/model/policy.py:7 in update"
    assert main_thread.place(StackSummary.from_list([("/lib/json.py", 3, "loads", "")])) == "json.py:3 in loads"
