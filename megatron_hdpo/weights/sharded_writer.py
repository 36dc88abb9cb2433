"""Writing of a sharded state as one of Megatron's distributed checkpoints, by threads of the rank.

Before 0.19 Megatron forks a process for each file, and keeps their results in another one. A rank has threads (of gloo,
the console, the engine), and a lock that one of them holds in the moment of a fork stays locked in the child for ever.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

# The writer of Megatron's own synchronous save; 0.19 takes one of another package for requests by default.
_WRITER = {"async_strategy": "mcore"} if "async_strategy" in signature(dist_checkpointing.save).parameters else {}


def write_sharded(sharded: Mapping[str, Any], folder: Path, written: Callable[[], object]) -> None:
    """Write a sharded state into a folder that exists. Collective.

    written: called on each rank when its files are written; a rank may write for longer than a collective may wait.
    """
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.SimpleQueue()  # the writers are threads of this process
    with torch.no_grad():
        request = dist_checkpointing.save(dict(sharded), str(folder), async_sharded_save=True, **_WRITER)
        _in_threads(request, written).execute_sync()


def _in_threads(request: AsyncRequest, written: Callable[[], object]) -> AsyncRequest:
    """Return the request to write this rank's files, by threads, with `written` before Megatron's own barrier."""

    def write(*args: Any, **kwargs: Any) -> None:
        if request.async_fn is not None:  # this rank may have nothing to write
            _threaded(request.async_fn)(*args, **kwargs)
        written()

    return request._replace(async_fn=write)


def _threaded(write: Any) -> Callable[..., None]:
    """Return `_write_files` for Megatron's own function, which forks before 0.19, and any other function as it is."""
    writer = filesystem_async.FileSystemWriterAsync
    own = [getattr(writer, f"write_preloaded_data_{way}", None) for way in ("multiproc", "multithread")]
    return partial(_write_files, write.args[0]) if getattr(write, "func", None) in own else write


def _write_files(transforms: list[Any], rank: int, files: Sequence[Any], results: Any) -> None:
    """Write the planned files of a rank, and put what Megatron expects of its processes: results by file, or an error.

    transforms: of the bytes of each tensor, as Megatron's writer has them.
    """
    done: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    unfinished: queue.Queue[int] = queue.Queue()

    def write(index: int) -> None:
        unfinished.put(index)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms,
            local_proc_idx=index,
            write_bucket=files[index],
            results_queue=done,
            count_queue=unfinished,
            use_fsync=True,
        )

    with ThreadPoolExecutor(len(files), thread_name_prefix="checkpoint") as threads:
        list(threads.map(write, range(len(files))))
    found = dict(done.get() for _ in files)
    errors = [result for result in found.values() if isinstance(result, Exception)]
    results.put(_cause(errors[0]) if errors else found)


def _cause(error: BaseException) -> BaseException:
    """Return the system's error behind one of torch, which says only that the place in the file is wrong."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, OSError):
        seen = seen.__cause__ or seen.__context__
    return seen or error
