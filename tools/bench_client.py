"""Measure what the SGLang client costs the trainer's process: processor seconds per sample, against canned answers.

    python tools/bench_client.py --out benchmarks/rollout_client.json

A process of its own answers /generate at once with tokens and log-probs, whole or in pieces. Each round asks for all
samples twice: answers are read in this process, then in the parsers' processes; the figures are medians over rounds.
interval 0: not streamed. parsers_mib: memory that the parsers' processes and their fork server share with no other.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import _environment  # noqa: F401
import numpy as np
import orjson
import psutil
from _canned import VOCABULARY, in_process, information, missing, piece, processor_seconds
from aiohttp import web

from megatron_hdpo.rollout.sglang.config import SGLangConfig
from megatron_hdpo.rollout.sglang.stamps import RunStamp
from megatron_hdpo.types.rollouts import GenerationRequest, SamplingParams

if TYPE_CHECKING:
    from megatron_hdpo.rollout.sglang.engine import SGLangEngine

VERSION, STAMP = 1, RunStamp("0" * 16)
PARSERS = SGLangConfig.model_fields["parser_processes"].default


def main() -> None:
    """Measure each interval and length; print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--intervals", type=int, nargs="+", default=[0, 32, 128, 512])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = []
    with in_process(serve) as url:
        for tokens in options.tokens:
            for interval in options.intervals:
                costs, mib = measured(url, tokens, interval, options.samples, options.rounds)
                found.append(
                    {
                        "tokens": tokens,
                        "interval": interval,
                        "ms_per_sample_read_here": round(costs[0], 2),
                        "ms_per_sample_read_by_parsers": round(costs[PARSERS], 2),
                        "ratio": round(costs[PARSERS] / costs[0], 2),
                        "parsers_mib": round(mib),
                    }
                )
                print(found[-1])
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=2) + "\n")


def measured(url: str, tokens: int, interval: int, samples: int, rounds: int) -> tuple[dict[int, float], float]:
    """Return processor milliseconds of this process per sample, by number of parsers, and the parsers' MiB."""
    costs: dict[int, list[float]] = {0: [], PARSERS: []}
    servers = {child.pid for child in psutil.Process().children(recursive=True)}
    with ExitStack() as stack:
        engines = {number: stack.enter_context(client(url, tokens, interval, number)) for number in costs}
        for turn in range(rounds + 1):
            for number, engine in engines.items():
                spent = milliseconds_per_sample(engine, f"{turn}", tokens, samples)
                if turn:  # the first round warms up
                    costs[number].append(spent)
        helpers = [child for child in psutil.Process().children(recursive=True) if child.pid not in servers]
        mib = sum(child.memory_full_info().uss for child in helpers) / 2**20
    return {number: statistics.median(spent) for number, spent in costs.items()}, mib


@contextmanager
def client(url: str, tokens: int, interval: int, parsers: int) -> Iterator[SGLangEngine]:
    """Yield an engine on the canned server."""
    # Not at the top, which the parsers' processes import, too: they hold no torch in a run.
    from megatron_hdpo.rollout.sglang.engine import SGLangEngine

    config = SGLangConfig(placement="given", urls=[url], stream_interval=interval, parser_processes=parsers)
    engine = SGLangEngine(config, [url], VOCABULARY, 2 * tokens, stamp=STAMP)
    try:
        engine.thread.run(engine.mark_served(engine.replicas, VERSION))
        yield engine
    finally:
        engine.close()


def milliseconds_per_sample(engine: SGLangEngine, name: str, tokens: int, samples: int) -> float:
    """Return the processor milliseconds of this process per sample of one round."""
    prompt, params = np.arange(256, dtype=np.int32), SamplingParams(tokens, n=8)
    requests = [GenerationRequest(f"{name}.{i}", prompt, params, i, f"{i}") for i in range(samples // 8)]
    begin = processor_seconds()
    engine.submit(requests)
    results = [result for result in engine.results() if result is not None]
    spent = processor_seconds() - begin
    assert sum(len(result.completions) for result in results) == len(requests) * 8, results[0].errors
    return 1000 * spent / (len(requests) * 8)


def serve(address: Connection) -> None:
    """Answer requests until this process is ended."""
    app = web.Application(client_max_size=2**30)
    app.router.add_get("/server_info", information)
    app.router.add_get("/begin_weight_update", missing)
    app.router.add_post("/generate", generate)

    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listening:
        address.send(f"http://127.0.0.1:{listening.getsockname()[1]}")
        web.run_app(app, sock=listening, print=None)


async def generate(request: web.Request) -> web.StreamResponse:
    """Answer at once, in pieces if they are asked for."""
    asked = orjson.loads(await request.read())
    tokens = asked["sampling_params"]["max_new_tokens"]
    if not asked.get("stream"):
        return web.Response(body=orjson.dumps(part(0, tokens, tokens)), content_type="application/json")
    interval = asked["sampling_params"]["stream_interval"]
    answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await answer.prepare(request)
    for start in range(0, tokens, interval):
        end = min(start + interval, tokens)
        await answer.write(b"data: " + orjson.dumps(part(start, end, tokens)) + b"\n\n")
    await answer.write(b"data: [DONE]\n\n")
    return answer


def part(start: int, end: int, tokens: int) -> dict[str, object]:
    """Return the answer's tokens from `start` to `end` of `tokens`."""
    if end < tokens:
        return piece(start, end, STAMP.of(VERSION))
    spans = [{"version": STAMP.of(VERSION), "start": 0, "end": tokens}]
    return piece(start, end, STAMP.of(VERSION), {"type": "length", "length": tokens}, spans)


if __name__ == "__main__":
    main()
