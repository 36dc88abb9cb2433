"""Measure the SGLang client against hundreds of fake servers: balance, what faults cost, staleness, the client's cost.

    python tools/bench_fleet.py --out benchmarks/fleet.json

The servers run in a process of their own, each at its port, and answer made-up tokens at the speed of a model of a
server (_fake_fleet.py); engine, dispatcher, breaker, watch and weight push are the real ones. Rounds, each on a new
fleet with 1 in 32 servers at 0.3 of the speed:

balanced: the engine as it is. in_turn: each prompt is bound to a server when it is requested, as with a fixed split.
faults: as many servers again die and return without weights, fail every sample, or hang for a while, and the weights
are updated twice amid the samples.

So that a run takes a minute on two cores, a slot stands for ten of a real server, a token for fifty, and servers are
slower: figures that depend on it are ratios. seconds are those of the clock.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import _environment  # noqa: F401
import numpy as np
import torch
from _canned import STOP_TOKEN, VOCABULARY, in_process
from _fake_fleet import Fault, ServerModel, serve
from _fleet_monitor import Monitor

from megatron_hdpo.rollout.sglang.config import SGLangConfig
from megatron_hdpo.rollout.sglang.dispatcher import Dispatcher
from megatron_hdpo.rollout.sglang.engine import SGLangEngine
from megatron_hdpo.rollout.sglang.replica import Replica
from megatron_hdpo.rollout.sglang.weights.push import WeightPush
from megatron_hdpo.rollout.sglang.weights.transports import TensorTransport
from megatron_hdpo.types.rollouts import Completion, GenerationRequest, SamplingParams

ROUNDS: dict[str, dict[str, Any]] = {
    "balanced": {"kinds": ("slow",)},
    "in_turn": {"kinds": ("slow",), "in_turn": True},
    "faults": {"kinds": ("slow", "dead", "failing", "hung"), "updates": (0.5, 0.75)},
}
WHEN = {"slow": (0.0, 1e3), "dead": (0.2, 0.2), "failing": (0.1, 0.5), "hung": (0.15, 0.5)}
"""Begin and duration of faults, in times that a fleet without faults takes for the batch."""


@dataclass(frozen=True)
class Batch:
    """What is sampled. most_tokens: max_new_tokens."""

    prompts: int
    samples_per_prompt: int
    most_tokens: int

    @property
    def samples(self) -> int:
        """Return the number of samples."""
        return self.prompts * self.samples_per_prompt


def main() -> None:
    """Run all rounds; print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", type=int, default=256)
    parser.add_argument("--slots", type=int, default=6, help="of each server")
    parser.add_argument("--fills", type=float, default=2.5, help="samples, in slots of all servers")
    parser.add_argument("--samples-per-prompt", type=int, default=8)
    parser.add_argument("--step", type=float, default=0.12, help="seconds of a decode step with all slots in use")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", nargs="+", default=list(ROUNDS), choices=list(ROUNDS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    each = options.samples_per_prompt
    batch = Batch(round(options.fills * options.servers * options.slots / each), each, most_tokens=96)
    # A step of a full server takes 1.4 times that of an idle one.
    model = ServerModel(
        slots=options.slots,
        first_s=options.step / 1.4,
        each_s=options.step * (1 - 1 / 1.4) / options.slots,
        prefill_steps=1.0,
        prompt_tokens=16,
        median=32.0,
        sigma=0.6,
        seed=options.seed,
    )
    report: dict[str, Any] = {
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "servers": options.servers,
        "batch": asdict(batch),
        "model": asdict(model),
        "rounds": {name: measure(options.servers, batch, model, **ROUNDS[name]) for name in options.rounds},
    }
    if {"balanced", "in_turn"} <= report["rounds"].keys():
        ours, other = report["rounds"]["balanced"], report["rounds"]["in_turn"]
        report["in_turn_over_balanced"] = {key: round(other[key] / ours[key], 2) for key in ("seconds", "tail_s")}
    print(json.dumps(report, indent=2))
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


def planned_faults(servers: int, kinds: Sequence[str], span_s: float, seed: int) -> list[Fault]:
    """Return the faults: of each kind on 1 in 32 servers, none of which has two."""
    drawn, each = iter(random.Random(seed).sample(range(servers), servers)), max(1, servers // 32)
    return [
        Fault(next(drawn), kind, WHEN[kind][0] * span_s, WHEN[kind][1] * span_s) for kind in kinds for _ in range(each)
    ]


def measure(
    servers: int,
    batch: Batch,
    model: ServerModel,
    kinds: Sequence[str],
    updates: Sequence[float] = (),
    in_turn: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Return the figures of one round on a new fleet.

    kinds: of faults. updates: times of weight updates, in times that a fleet without faults takes. in_turn: prompts are
    bound to servers when they are requested. settings: of the engine.
    """
    keys = [f"{prompt}/{index}" for prompt in range(batch.prompts) for index in range(batch.samples_per_prompt)]
    lengths = [model.length(key, batch.most_tokens) for key in keys]
    span_s = sum(lengths) / (servers * model.tokens_per_s)
    faults = planned_faults(servers, kinds, span_s, model.seed)
    with in_process(serve, servers, model) as urls:
        config = SGLangConfig(
            placement="given",
            urls=urls,
            max_concurrency=model.slots,
            **{"stream_interval": 16, "health_interval_s": 2.0, "health_timeout_s": 2.0} | settings,
        )
        config.sync.timeout_s = 5.0
        engine = SGLangEngine(config, urls, VOCABULARY, model.prompt_tokens + batch.most_tokens)
        try:
            if in_turn:
                engine._dispatcher = InTurn(engine.replicas, model.slots, 600.0, engine.watch.trial)
            return _round(engine, batch, model, faults, [share * span_s for share in updates])
        finally:
            engine.close()


def _round(
    engine: SGLangEngine, batch: Batch, model: ServerModel, faults: Sequence[Fault], updates: list[float]
) -> dict[str, Any]:
    push = WeightPush(engine, TensorTransport(5.0), None)
    push.push(weights(), 1)
    engine.thread.run(engine.replicas[0].api.post("/faults", {"all": [asdict(fault) for fault in faults]}, 60))
    with Monitor(engine) as monitor:
        engine.submit(requests(batch, model))
        completions, versions = [], 1
        for result in engine.results():
            if updates and monitor.seconds > updates[0]:
                versions += 1
                push.push(weights(), versions)
                del updates[0]
            completions += result.completions if result is not None else []
    return {
        "samples": batch.samples,
        "lost": batch.samples - len(completions),
        **monitor.balance(model, faults),
        "staleness": staleness(completions, engine.weight_version),
        "client": monitor.cost(batch.samples),
        "metrics": {name: float(value) for name, value in engine.metrics().items()},
    }


def weights() -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the smallest model: servers look at its stamp only."""
    yield "weight", torch.zeros(4)


def requests(batch: Batch, model: ServerModel) -> list[GenerationRequest]:
    """Return the requests of a batch, each with a prompt of its own."""
    params = SamplingParams(batch.most_tokens, n=batch.samples_per_prompt, stop_token_ids=(STOP_TOKEN,))
    prompt = np.full(model.prompt_tokens, 2, dtype=np.int32)
    return [
        GenerationRequest(f"{i}", np.concatenate([[3 + i], prompt[1:]]).astype(np.int32), params, i, f"{i}")
        for i in range(batch.prompts)
    ]


def staleness(completions: Sequence[Completion], newest: int) -> dict[str, float]:
    """Return the share of tokens by the updates that came after they were sampled, and of samples of two versions."""
    behind = newest - np.concatenate([completion.weight_versions for completion in completions])
    mixed = [completion.weight_versions.min() < completion.weight_versions.max() for completion in completions]
    shares = {f"{updates}_updates": float(np.mean(behind == updates)) for updates in np.unique(behind)}
    return {name: round(share, 4) for name, share in (shares | {"mixed_samples": float(np.mean(mixed))}).items()}


class InTurn(Dispatcher):
    """Binds each prompt to a server when it is requested, in turn, as a fixed split of prompts over servers does."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._bound: dict[str, int] = {}
        self._slots = [asyncio.Semaphore(self.limit) for _ in self.replicas]
        self._waiting: set[object] = set()

    @asynccontextmanager
    async def slot(self, affinity: str, n: int, avoid: Collection[int]) -> AsyncIterator[Replica]:
        """Hold a slot of the prompt's server."""
        index, mark = self._bound.setdefault(affinity, len(self._bound) % len(self.replicas)), object()
        self._waiting.add(mark)
        async with self._slots[index]:
            self._waiting.discard(mark)
            self.replicas[index].taken += 1
            try:
                yield self.replicas[index]
            finally:
                self.replicas[index].taken -= 1

    def refresh(self) -> None:
        """Do nothing: no sample goes to another server."""

    def assign(self) -> None:
        """Do nothing: samples are bound already."""


if __name__ == "__main__":
    main()
