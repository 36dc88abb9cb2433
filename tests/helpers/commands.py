"""The command line and functions of the package on one rank or several, each rank a process, as under torchrun."""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from distributed_helper import environment_of, forkserver

GRACE_SECONDS = 10.0
"""Seconds that the other ranks get to end once one has failed; torchrun kills them at once."""


@dataclass(frozen=True)
class Ended:
    """How the ranks ended, in rank order. codes: exit codes, -9 for a rank that had to be killed."""

    codes: list[int]
    stdout: list[str]
    stderr: list[str]
    results: list[Any]

    @property
    def text(self) -> str:
        """Everything that all ranks printed."""
        return "".join(
            f"--- rank {r}\n{out}{err}" for r, (out, err) in enumerate(zip(self.stdout, self.stderr, strict=True))
        )


def run_command(
    *argv: str, ranks: int = 1, environment: Mapping[str, str] | None = None, timeout: float = 300
) -> Ended:
    """`python -m megatron_hdpo argv` on so many ranks."""
    return run_world(ranks, _command, [str(a) for a in argv], environment=environment, timeout=timeout)


def run_world(
    ranks: int,
    function: Callable[..., Any],
    *args: Any,
    environment: Mapping[str, str] | None = None,
    timeout: float = 300,
    grace: float = GRACE_SECONDS,
) -> Ended:
    """`function(*args)` (module level, picklable) on so many ranks. Unlike `distributed_helper.run_ranks` it lets ranks
    have children (reward workers) and hands over how they ended and what they printed in place of raising."""
    context = forkserver()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(ranks):
            variables = environment_of(rank, ranks, store.port) | {
                "LOCAL_WORLD_SIZE": str(ranks),
                "CUDA_VISIBLE_DEVICES": "",
                **(environment or {}),
            }
            process = context.Process(target=_work, args=(Path(folder), rank, variables, function, args))
            process.start()
            processes.append(process)
        codes = _wait(processes, timeout, grace)
        read = [[_read(Path(folder) / f"{kind}{rank}") for rank in range(ranks)] for kind in ("out", "err")]
        results = [_result(Path(folder) / f"result{rank}") for rank in range(ranks)]
    return Ended(codes, read[0], read[1], results)


def results_of(ended: Ended) -> list[Any]:
    """The ranks' return values; fails with all that they printed unless every rank ended well."""
    assert ended.codes == [0] * len(ended.codes), f"exit codes {ended.codes}\n{ended.text}"
    return ended.results


def _command(argv: Sequence[str]) -> None:
    from megatron_hdpo.cli import main

    main(argv)


def _wait(processes: Sequence[Any], timeout: float, grace: float) -> list[int]:
    deadline = time.monotonic() + timeout
    failed_at: float | None = None
    while any(process.exitcode is None for process in processes):
        now = time.monotonic()
        if failed_at is None and any(process.exitcode for process in processes):
            failed_at = now
        if now > deadline or (failed_at is not None and now > failed_at + grace):
            break
        time.sleep(0.02)
    for process in processes:
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def _work(folder: Path, rank: int, variables: Mapping[str, str], function: Callable[..., Any], args: Any) -> None:
    for descriptor, kind in ((1, "out"), (2, "err")):
        file = os.open(folder / f"{kind}{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
    # The streams that the fork server had may be closed, and pytest's capturing must not see ours.
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(variables)
    import torch

    torch.set_num_threads(1)
    result = function(*args)
    (folder / f"result{rank}").write_bytes(pickle.dumps(result))


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _result(path: Path) -> Any:
    return pickle.loads(path.read_bytes()) if path.exists() else None
