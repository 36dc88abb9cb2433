"""Parts of fake SGLang servers that benchmarks share: what a server says of itself, its answers, its process."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from aiohttp import web

VOCABULARY = 151_936
STOP_TOKEN = 1
"""Stop token of canned answers; no other token of the first 20,000 is equal to it."""


async def information(request: web.Request) -> web.Response:
    """Describe a server of the version that is tested."""
    return web.json_response({"version": "0.5.23", "incremental_streaming_output": True})


async def missing(request: web.Request) -> web.Response:
    """Say that updates have no session."""
    return web.Response(status=404)


def piece(
    start: int, end: int, stamp: str, finish: dict[str, Any] | None = None, spans: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """Return the answer's tokens from `start` to `end`, as SGLang sends them without a tokenizer.

    stamp: of the weights when it is sent. finish: why the answer ends with it; None: it goes on. spans: versions of the
    whole answer's tokens, told at its end.
    """
    ids = [(7 * i) % VOCABULARY for i in range(start, end)]
    if finish is not None and finish["type"] == "stop":
        ids[-1] = STOP_TOKEN
    meta: dict[str, Any] = {"finish_reason": finish, "completion_tokens": end, "weight_version": stamp}
    if finish is not None:
        meta["weight_versions"] = list(spans)
    meta["output_token_logprobs"] = [[-1.0 - 1e-7 * i, token, None] for i, token in enumerate(ids)]
    return {"output_ids": ids, "meta_info": meta}


def processor_seconds() -> float:
    """Return the processor seconds of this process, without its children."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@contextmanager
def in_process(serve: Callable[..., None], *arguments: Any) -> Iterator[Any]:
    """Yield the first thing that `serve(connection, *arguments)` sends, in a process of its own."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()  # so that a process that dies is an end of file, not a silence
    try:
        yield ours.recv()
    finally:
        process.terminate()
        process.join()
