"""Measure what the SGLang client costs the trainer's process: processor seconds per sample, against canned answers.

    python tools/bench_client.py --out benchmarks/rollout_client.json

A process of its own answers /generate at once with tokens and log-probs, whole or in pieces. Each round asks for all
samples; the figures are medians over rounds. interval 0: not streamed.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
from multiprocessing.connection import Connection
from pathlib import Path

import _environment  # noqa: F401
import numpy as np
import orjson
from _canned import VOCABULARY, in_process, information, missing, piece, processor_seconds
from aiohttp import web

from megatron_hdpo.rollout.sglang.config import SGLangConfig
from megatron_hdpo.rollout.sglang.engine import SGLangEngine
from megatron_hdpo.rollout.sglang.stamps import RunStamp
from megatron_hdpo.types.rollouts import GenerationRequest, SamplingParams

VERSION, STAMP = 1, RunStamp("0" * 16)


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
                cost = milliseconds_per_sample(url, tokens, interval, options.samples, options.rounds)
                found.append({"tokens": tokens, "interval": interval, "cpu_ms_per_sample": round(cost, 2)})
                print(found[-1])
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=2) + "\n")


def milliseconds_per_sample(url: str, tokens: int, interval: int, samples: int, rounds: int) -> float:
    """Return the processor milliseconds of this process per sample."""
    config = SGLangConfig(placement="given", urls=[url], stream_interval=interval)
    engine = SGLangEngine(config, [url], VOCABULARY, 2 * tokens, stamp=STAMP)
    try:
        engine.thread.run(engine.mark_served(engine.replicas, VERSION))
        prompt = np.arange(256, dtype=np.int32)
        costs = []
        for turn in range(rounds + 1):
            params = SamplingParams(tokens, n=8)
            requests = [GenerationRequest(f"{turn}.{i}", prompt, params, i, f"{i}") for i in range(samples // 8)]
            begin = processor_seconds()
            engine.submit(requests)
            results = [result for result in engine.results() if result is not None]
            assert sum(len(result.completions) for result in results) == len(requests) * 8, results[0].errors
            if turn:  # the first round warms up
                costs.append((processor_seconds() - begin) / (len(requests) * 8))
    finally:
        engine.close()
    return 1000 * statistics.median(costs)


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
