"""Run a function on several gloo ranks in one test: `run_ranks(4, work, arg)` returns each rank's result."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch.distributed as dist

# Workers are forked from one server that has imported these: the seconds of import are paid once per test session.
_PRELOAD = [
    "megatron.core.models.gpt",
    "megatron.core.distributed",
    "megatron.core.dist_checkpointing",
    "transformers.models.auto",
    "transformers.models.llama.modeling_llama",
    "safetensors.torch",
]


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call `function(*args)` on ranks 0 to world_size - 1 and return the results in rank order.

    Each rank is a process of its own with torchrun's environment variables set; `function` starts the process group
    (`parallel.context.start`) and should try many cases per call, as a world takes seconds to make. Function and
    arguments must be picklable (module-level). Raises AssertionError with the first failing rank's traceback, or
    naming the ranks that had not returned after `timeout` seconds; no process is left behind.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    # The parent keeps the store that ranks meet at, on a port that the system chose: no two runs can collide.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes: dict[Connection, int] = {}
    processes = []
    try:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            environment = _environment(rank, world_size, store.port)
            # Not daemons: those may not start processes, which Megatron's checkpoint writer does.
            process = context.Process(target=_work, args=(sender, environment, function, args))
            process.start()
            sender.close()
            pipes[receiver] = rank
            processes.append(process)
        return _collect(pipes, time.monotonic() + timeout, timeout)
    finally:
        _end(processes, grace=5.0 if not pipes else 0.0)


def _end(processes: list[BaseProcess], grace: float) -> None:
    """Let ranks that returned clean up for `grace` seconds in all, then kill those left, with what they started."""
    deadline = time.monotonic() + grace
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():  # never by the number of a process that is gone: it may be another's by now
            assert process.pid is not None
            with suppress(ProcessLookupError):  # no group yet: it had not begun its work
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
        process.join()


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
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
            except EOFError:
                failure, result = "its process died without a word", None
            if failure is not None:
                raise AssertionError(f"rank {rank} of {world_size} failed:\n{failure}")
            results[rank] = result
    return [results[rank] for rank in range(world_size)]


def _work(sender: Connection, environment: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.setpgid(0, 0)  # Megatron's checkpoint writer starts processes: they are to end with the rank
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    try:
        outcome = (None, function(*args))
    except BaseException:
        outcome = (traceback.format_exc(), None)
    sender.send(outcome)
    sender.close()
    if outcome[0] is None and dist.is_initialized():
        dist.destroy_process_group()
