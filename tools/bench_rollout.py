"""Measure rollouts on SGLang: throughput, weight syncs, and early privileged rollouts.

    python tools/bench_rollout.py --python .venv-sglang/bin/python --out benchmarks/rollout_cpu.json

Throughput is that of the engine beside a bare load generator; syncs are measured by path and model size; the last part
measures what is saved by requesting privileged rollouts at once. All on one server, in one run.

--url: a running server, instead of one that is started (then sync is measured at its model's size only).
--environment NAME=VALUE: for the server that is started; on a CPU it needs PYTHONPATH=tests/sglang_cpu/shim.
Rounds of the compared things alternate; the figures are medians over rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import _environment  # noqa: F401
import aiohttp
import numpy as np
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_hdpo.data.config import DataConfig
from megatron_hdpo.data.load import load
from megatron_hdpo.model.tiny_model import make_tiny_model
from megatron_hdpo.objectives.base import ObjectiveDeps
from megatron_hdpo.objectives.hdpo import HDPO, HDPOConfig
from megatron_hdpo.parallel.context import start
from megatron_hdpo.parallel.layout import ParallelConfig
from megatron_hdpo.rewards.config import RewardConfig
from megatron_hdpo.rewards.pool import RewardPool
from megatron_hdpo.rollout.config import RolloutConfig
from megatron_hdpo.rollout.sglang.asking import request_body
from megatron_hdpo.rollout.sglang.config import SGLangConfig
from megatron_hdpo.rollout.sglang.engine import SGLangEngine
from megatron_hdpo.rollout.sglang.servers.command import ServerLaunch
from megatron_hdpo.rollout.sglang.servers.config import ServerConfig
from megatron_hdpo.rollout.sglang.servers.server import ServerProcess
from megatron_hdpo.rollout.sglang.weights.gate import Gate
from megatron_hdpo.rollout.sglang.weights.push import Transport, WeightPush
from megatron_hdpo.rollout.sglang.weights.transports import BroadcastTransport, DiskTransport, TensorTransport
from megatron_hdpo.sampling.coordinator import RolloutCoordinator
from megatron_hdpo.sampling.sampler import RolloutSampler
from megatron_hdpo.types.rollouts import GenerationRequest, SamplingParams

# Heads have 64 channels: attention kernels of GPUs support few sizes.
SIZES = {
    "small": {"layers": 4, "hidden": 128, "heads": 2, "kv_heads": 1, "ffn": 256},
    "large": {"layers": 12, "hidden": 512, "heads": 8, "kv_heads": 4, "ffn": 1536},
}


def main() -> None:
    """Run all measurements; print and write the report."""
    options = parse_options()
    # Broadcasts to a server's group need torch's default process group.
    context = start(ParallelConfig(), options.device)
    report: dict[str, Any] = {"machine": machine(), "options": {k: str(v) for k, v in vars(options).items()}}
    with tempfile.TemporaryDirectory() as scratch:
        for name in ["small"] if options.url else SIZES:
            with server(options, Path(scratch), name) as (url, model):
                if name == "small":
                    report["throughput"] = throughput(options, url, model)
                    write(report, options.out)
                    report["privileged_overlap"] = overlap(options, url, model, context)
                    write(report, options.out)
                report.setdefault("sync", [])
                for found in syncs(options, url, model, Path(scratch)):
                    report["sync"].append(found)
                    write(report, options.out)
    Console().print_json(json.dumps(report))


def write(report: dict[str, Any], out: Path | None) -> None:
    """Write the report as far as it goes, after each measurement: a later one may fail."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=2) + "\n")


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, help="interpreter that has SGLang; this one by default")
    parser.add_argument("--environment", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--url")
    parser.add_argument("--model", type=Path, help="with --url: the folder that the server has loaded")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--top-logprobs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def machine() -> dict[str, Any]:
    """Return the properties of the machine that the figures depend on."""
    return {"cores": os.cpu_count(), "load": os.getloadavg()[0], "torch": torch.__version__}


@contextmanager
def server(options: argparse.Namespace, scratch: Path, size: str) -> Iterator[tuple[str, Path]]:
    """Yield the address and the model folder of a server."""
    if options.url:
        yield options.url, options.model
        return
    model = make_tiny_model(scratch / size, max_positions=256, **SIZES[size])
    config = ServerConfig(
        python=options.python,
        dtype="float32" if options.device == "cpu" else "bfloat16",
        max_total_tokens=32_768,
        max_running_requests=options.concurrency,
        environment={"OMP_NUM_THREADS": "1"} | dict(pair.split("=", 1) for pair in options.environment),
        stop_timeout_s=0.0,
    )
    process = ServerProcess(config, ServerLaunch(model, options.device), scratch / f"logs-{size}")
    try:
        process.start()
        process.wait_ready()
        yield process.url, model
    finally:
        process.close()


@contextmanager
def engine_on(options: argparse.Namespace, url: str, model: Path) -> Iterator[tuple[SGLangEngine, Any]]:
    """Yield an engine that has the model's weights, and the model on the device in the server's precision."""
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    weights = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(options.device)
    settings = SGLangConfig(placement="given", urls=[url], max_concurrency=options.concurrency)
    engine = SGLangEngine(settings, [url], weights.config.vocab_size, weights.config.max_position_embeddings)
    try:
        WeightPush(engine, TensorTransport(600.0), None).push(iter(weights.state_dict().items()), 0)
        yield engine, weights
    finally:
        engine.close()


def throughput(options: argparse.Namespace, url: str, model: Path) -> dict[str, float]:
    """Measure generated tokens per second of the engine and of a bare load generator.

    The load generator sends the same bodies and reads the answers without parsing them.
    """
    rates: dict[str, list[float]] = {"engine": [], "bare": []}
    with engine_on(options, url, model) as (engine, _):
        params = SamplingParams(options.new_tokens, n=1, top_logprobs=options.top_logprobs)
        requests = [GenerationRequest(f"{i}", np.arange(3, 11, dtype=np.int32), params) for i in range(options.samples)]
        bodies = [request_body(request, 0, engine.deterministic) for request in requests]
        tokens = options.samples * options.new_tokens
        for turn in range(options.rounds + 1):
            begin = time.perf_counter()
            engine.submit(requests)
            assert sum(len(r.completions) for r in engine.results() if r is not None) == options.samples
            middle = time.perf_counter()
            asyncio.run(bare_load(url, bodies, options.concurrency))
            end = time.perf_counter()
            if turn:  # the first round warms caches up
                rates["engine"].append(tokens / (middle - begin))
                rates["bare"].append(tokens / (end - middle))
    ratios = [ours / theirs for ours, theirs in zip(rates["engine"], rates["bare"], strict=True)]
    return {
        "engine_tokens_per_s": statistics.median(rates["engine"]),
        "bare_tokens_per_s": statistics.median(rates["bare"]),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


async def bare_load(url: str, bodies: Sequence[dict[str, Any]], concurrency: int) -> None:
    """Send all bodies, `concurrency` of them at a time."""
    slots = asyncio.Semaphore(concurrency)
    async with aiohttp.ClientSession() as session:

        async def ask(body: dict[str, Any]) -> None:
            async with slots, session.post(f"{url}/generate", json=body) as answer:
                await answer.read()
                assert answer.status == 200

        await asyncio.gather(*(ask(body) for body in bodies))


def syncs(options: argparse.Namespace, url: str, model: Path, scratch: Path) -> Iterator[dict[str, Any]]:
    """Measure the seconds of a push by each path, with and without the gate."""
    device = torch.device(options.device)
    with engine_on(options, url, model) as (engine, weights):
        config = weights.config
        gate = Gate(
            config.num_key_value_heads, config.vocab_size, options.device, 600.0, min_peak=0.0
        )  # random weights
        transports: dict[str, Transport] = {
            "tensor": TensorTransport(600.0),
            "distributed": BroadcastTransport(600.0, device),
            "disk": DiskTransport(600.0, scratch / "sync", model),
        }
        for path, transport in transports.items():
            seconds: dict[bool, list[float]] = {True: [], False: []}
            for turn in range(options.rounds + 1):
                for gated in (True, False):
                    push = WeightPush(engine, transport, gate if gated else None)
                    begin = time.perf_counter()
                    report = push.push(iter(weights.state_dict().items()), turn)
                    if turn:
                        seconds[gated].append(time.perf_counter() - begin)
            push.close()
            whole, ungated = (statistics.median(seconds[gated]) for gated in (True, False))
            yield {
                "path": path,
                "megabytes": report.num_bytes / 1e6,
                "seconds": ungated,
                "seconds_with_gate": whole,
                "gb_per_s": report.num_bytes / 1e9 / ungated,
            }


def overlap(options: argparse.Namespace, url: str, model: Path, context: Any) -> dict[str, float]:
    """Measure the rollouts of a step in which every prompt is a cliff (the model is random).

    Privileged rollouts are requested at once, or after the last student rollout.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    data = DataConfig.model_validate(
        {
            "train": [{"kind": "digit_sums", "name": "sums", "lengths": [6], "size": 64}],
            "prompts": {
                "chat": False,
                "student": "{{ question }}",
                "privileged": "{{ question }}#{{ solution }}",
                "privileged_context": "solution",
                "max_prompt_tokens": 24,
                "max_privileged_tokens": 64,
            },
        }
    )
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with (
        engine_on(options, url, model) as (engine, _),
        RewardPool(data.tasks, RewardConfig(workers=1)) as rewards,
    ):
        loaded = load(data, tokenizer, rewards)
        problems = loaded.train[:16]
        objective = HDPO(HDPOConfig(), ObjectiveDeps())
        sampler = RolloutSampler(engine, rewards, lambda ids: tokenizer.decode(ids.tolist(), skip_special_tokens=True))
        for turn in range(options.rounds + 1):
            for at_once in (True, False):
                settings = RolloutConfig(
                    samples_per_prompt=4, max_new_tokens=options.new_tokens, overlap_privileged=at_once
                )
                coordinator = RolloutCoordinator(settings, context, sampler, loaded.prompts, (1,), seed=turn)
                begin = time.perf_counter()
                coordinator.step(problems, turn, objective)
                if turn:
                    seconds[at_once].append(time.perf_counter() - begin)
    on, off = (statistics.median(seconds[at_once]) for at_once in (True, False))
    return {"seconds_at_once": on, "seconds_afterwards": off, "ratio": on / off}


if __name__ == "__main__":
    main()
