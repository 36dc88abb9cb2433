"""Run a function on several gloo ranks in one test: `run_ranks(4, work, arg)` returns each rank's result.

Ranks are processes that stay for the next test: a world of each size is started once per test process.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import psutil
import torch.distributed as dist

import megatron_hdpo  # noqa: F401  it silences what Megatron says at import

# Ranks are forked from one server that has imported these: the seconds of import are paid once per test process.
PRELOAD = [
    "megatron.core.models.gpt",
    "megatron.core.distributed",
    "megatron.core.dist_checkpointing",
    "transformers.models.auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "safetensors.torch",
    "torch.utils.tensorboard",
    "megatron_hdpo.cli",
    "megatron_hdpo.training.loop",
    "megatron_hdpo.tracking.report",
    "megatron_hdpo.rewards.math",
    "megatron_hdpo.rewards.worker",
]
LARGEST_KEPT = 4
"""Ranks of the largest world that is kept: larger ones are rare and cost memory."""
MOST_THREADS = 40
"""Threads of a rank that is kept. Groups that outlive their layout keep three each, which wake up a hundred times a
second: with those of ten layouts, ranks do little else."""


def forkserver() -> Any:
    """Return the multiprocessing context that forks ranks from a server with every import behind it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 300.0, fresh: bool = False
) -> list[Any]:
    """Call `function(*args)` on ranks 0 to world_size - 1 and return the results in rank order.

    Each rank is a process with torchrun's environment variables set; `function` starts the process group
    (`parallel.context.start`). Function and arguments must be picklable (module-level). Processes are reused: what
    `function` leaves behind of process groups and environment variables is undone; a function that patches modules or
    reads what the whole process did needs `fresh`, a world of its own.
    Raises AssertionError with the first failing rank's traceback, or naming the ranks that had not returned after
    `timeout` seconds; that world is killed, with all that it started.
    """
    keep = not fresh and world_size <= LARGEST_KEPT
    world = (_kept.pop(world_size, None) if keep else None) or _World(world_size)
    results = None
    try:
        results = world.run(function, args, timeout)
    finally:  # a world that failed is not used again
        if keep and results is not None and world.threads <= MOST_THREADS:
            _kept[world_size] = world
        else:
            world.end(grace=5.0 if results is not None else 0.0)
    return results


def leave_layout() -> None:
    """End Megatron's groups; the process group of all ranks stays for the next layout."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    _close_meetings()
    dist.barrier()  # a rank may still be in a collective of one of the groups
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()  # models and groups refer to each other


def _close_meetings() -> None:
    """End the threads of every context of this process, whoever holds it."""
    from megatron_hdpo.parallel.meetings import Meetings

    for found in [each for each in gc.get_objects() if type(each) is Meetings]:
        found.close()


@dataclass(frozen=True)
class _Job:
    """What each rank of a world is to call. environment: torchrun's variables, by rank."""

    environment: list[dict[str, str]]
    function: Callable[..., Any]
    args: tuple[Any, ...]


class _World:
    """Processes that run one job after another until `end`. threads: those of one rank after the last job, at most."""

    def __init__(self, size: int) -> None:
        context = forkserver()
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        self.threads = 0
        for rank in range(size):
            ours, theirs = context.Pipe()
            # Not daemons: those may not start processes, which Megatron's checkpoint writer does.
            process = context.Process(target=_serve, args=(theirs, rank))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        # The parent keeps the store that ranks meet at, on a port that the system chose, and each job has its own: no
        # two jobs can collide, and no job finds the keys of another.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        size = len(self._pipes)
        job = _Job([environment_of(rank, size, store.port) for rank in range(size)], function, args)
        for pipe in self._pipes:
            pipe.send(job)
        pipes = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        results, threads = zip(*_collect(pipes, time.monotonic() + timeout, timeout), strict=True)
        self.threads = max(threads)
        return list(results)

    def end(self, grace: float) -> None:
        """Let ranks clean up for `grace` seconds in all, then kill those left, with what they started."""
        for pipe in self._pipes:
            pipe.close()
        deadline = time.monotonic() + grace
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():  # never by the number of a process that is gone: it may be another's by now
                assert process.pid is not None
                with suppress(ProcessLookupError):  # no group yet: it had not begun its work
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
            process.join()


_kept: dict[int, _World] = {}


@atexit.register
def end_kept_worlds() -> None:
    """End the worlds that wait for another job; multiprocessing would wait for them at exit."""
    while _kept:
        _kept.popitem()[1].end(grace=2.0)


def environment_of(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return the environment variables that torchrun gives a rank of one node."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # As under torchrun: the store exists already, no rank has to open it.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
    }


def _collect(pipes: dict[Connection, int], deadline: float, timeout: float) -> list[Any]:
    world_size, results = len(pipes), {}
    while pipes:
        ready = wait(list(pipes), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise AssertionError(f"ranks {sorted(pipes.values())} of {world_size} had not returned after {timeout} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pipes.pop(pipe)
            try:
                failure, result = pipe.recv()
            except (EOFError, ConnectionResetError):
                failure, result = "its process died without a word", None
            if failure is not None:
                raise AssertionError(f"rank {rank} of {world_size} failed:\n{failure}")
            results[rank] = result
    return [results[rank] for rank in range(world_size)]


def _serve(pipe: Connection, rank: int) -> None:
    """Run jobs until the pipe is closed."""
    os.setpgid(0, 0)  # Megatron's checkpoint writer starts processes: they are to end with the rank
    import torch

    torch.set_num_threads(1)
    before = dict(os.environ)
    while True:
        try:
            job = pipe.recv()
        except (EOFError, ConnectionResetError):
            return
        os.environ.update(job.environment[rank])
        try:
            result = job.function(*job.args)
            _forget(before)
            pipe.send((None, (result, psutil.Process().num_threads())))
        except BaseException:  # the owner ends this world: other ranks may wait for this one for ever
            pipe.send((traceback.format_exc(), None))


def _forget(environment: dict[str, str]) -> None:
    """Undo what a job leaves behind."""
    from megatron_hdpo.parallel.context import stop

    _close_meetings()
    stop()
    gc.collect()  # models and groups refer to each other, and groups keep threads
    os.environ.clear()
    os.environ.update(environment)
