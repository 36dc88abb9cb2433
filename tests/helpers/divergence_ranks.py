"""Four gloo processes that live as long as the test session and run one function after another.

Starting a process takes seconds and a case milliseconds, so hundreds of cases share one start.
"""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from distributed_helper import forkserver

WORLD = 4


def _serve(rank: int, port: int, jobs: Any, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, init_method=f"tcp://127.0.0.1:{port}")
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    while (job := jobs.get()) is not None:
        size, function, arguments = job
        group = {1: None, 2: pairs[rank // 2], 4: dist.group.WORLD}[size]
        try:
            results.put((rank, function(group, rank % size, size, *arguments), None))
        except BaseException:
            results.put((rank, None, traceback.format_exc()))
    os._exit(0)  # nothing to tear down, and gloo's own end waits for its peers


def _ready(group: Any, rank: int, size: int) -> None:
    dist.barrier(group)


class Ranks:
    """`run(size, function, *arguments)` calls function(group, rank, size, *arguments) in `size` processes."""

    def __init__(self) -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        context = forkserver()
        self.results = context.Queue()
        self.jobs = [context.Queue() for _ in range(WORLD)]
        self.processes = [
            context.Process(target=_serve, args=(r, port, self.jobs[r], self.results), daemon=True)
            for r in range(WORLD)
        ]
        for process in self.processes:
            process.start()
        self.run(WORLD, _ready, deadline_s=300)  # a busy machine takes long to import

    def run(self, size: int, function: Callable[..., Any], *arguments: Any, deadline_s: float = 60) -> list[Any]:
        for rank in range(size):
            self.jobs[rank].put((size, function, arguments))
        answers, errors = {}, []
        for _ in range(size):
            rank, answer, error = self.results.get(timeout=deadline_s)
            answers[rank] = answer
            errors += [f"rank {rank}:\n{error}"] if error else []
        assert not errors, "\n".join(errors)
        return [answers[rank] for rank in range(size)]

    def close(self) -> None:
        for jobs in self.jobs:
            jobs.put(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
