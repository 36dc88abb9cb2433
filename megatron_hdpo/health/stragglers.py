"""Who keeps the others waiting: every step the ranks' seconds of forward and backward, now and then the links."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_hdpo.health.config import HealthConfig
from megatron_hdpo.health.findings import Place, place_here
from megatron_hdpo.health.links import allreduce_gb_per_s
from megatron_hdpo.model.chunks import chunks_of
from megatron_hdpo.model.policy import Policy
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.tracking.console import Console

Moment = Any
"""Host seconds, or a CUDA event in this rank's stream."""


class ComputeClock:
    """Seconds from a step's first training forward pass to the start of its reduction of gradients.

    That is where data-parallel replicas first wait for each other in an update: what a rank took before is its own.
    Inside a replica ranks wait for each other in every layer, so they look equally slow. On a GPU two events are
    recorded per update, and read when the step is over; nothing is synchronised for them before.

    host_seconds: the clock of a run on the CPU.
    """

    def __init__(self, device: torch.device, host_seconds: Callable[[], float] = time.perf_counter) -> None:
        self._device = device
        self._host_seconds = host_seconds
        self._began: Moment | None = None
        self._spans: list[tuple[Moment, Moment]] = []

    def attach(self, policy: Policy) -> None:
        """Follow the policy's updates from now on; scoring is without gradients and is left out."""
        chunks_of(policy.ddp)[0].register_forward_pre_hook(self._forward)
        config = policy.model.config
        config.finalize_model_grads_func = self._before_reduction(config.finalize_model_grads_func)

    def seconds(self) -> float:
        """Of the updates since the last call; starts over."""
        spans, self._spans = self._spans, []
        if self._device.type != "cuda":
            return sum(end - start for start, end in spans)
        if spans:
            spans[-1][1].synchronize()
        return sum(start.elapsed_time(end) for start, end in spans) / 1e3

    def _forward(self, module: torch.nn.Module, arguments: Any) -> None:
        if self._began is None and torch.is_grad_enabled():
            self._began = self._now()

    def _before_reduction(self, reduce: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._began is not None:
                self._spans.append((self._began, self._now()))
                self._began = None
            return reduce(*args, **kwargs)

        return timed

    def _now(self) -> Moment:
        if self._device.type != "cuda":
            return self._host_seconds()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class StragglerWatch:
    """`ranks/...` metrics of each step, and warnings of a rank or links that stay slow. Every call is collective.

    policy: the one whose updates are timed. first_gb_per_s: the all-reduce that the health checks measured.
    host_seconds: the clock of a run on the CPU.
    """

    def __init__(
        self,
        config: HealthConfig,
        context: ParallelContext,
        console: Console,
        policy: Policy,
        first_gb_per_s: float | None = None,
        host_seconds: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._config, self._context, self._console = config, context, console
        self._first_gb_per_s = first_gb_per_s
        self._clock = ComputeClock(context.device, host_seconds)
        self._clock.attach(policy)
        self._places: list[Place] = context.gather_objects(place_here(context.rank))
        self._stages: list[int] = context.gather_objects(context.groups.pp.rank())
        self._suspect, self._times = -1, 0

    def metrics(self, step: int) -> dict[str, float]:
        """After the updates of step `step`, counted from 1; {} for a run of one rank."""
        own = self._clock.seconds()
        if len(self._places) == 1:
            return {}
        seconds = self._context.gather_objects(own)
        metrics = compare(seconds, self._stages)
        self._judge(int(metrics["ranks/slowest"]), metrics["ranks/slowest_ratio"])
        if self._config.every is not None and step % self._config.every == 0:
            metrics |= self._probe()
        return metrics

    def _judge(self, slowest: int, ratio: float) -> None:
        if ratio <= self._config.straggler_ratio:
            self._suspect, self._times = -1, 0
            return
        self._times = self._times + 1 if slowest == self._suspect else 1
        self._suspect = slowest
        if self._times == self._config.straggler_steps:
            self._console.warn(
                f"rank {slowest} on {self._places[slowest].host} has been the slowest of {len(self._places)} for "
                f"{self._times} steps, {ratio:.1f} x the median in the last one: all others wait for it (or for "
                "another rank of its replica)"
            )

    def _probe(self) -> dict[str, float]:
        now = max(self._context.gather_objects(allreduce_gb_per_s(self._context)))
        self._first_gb_per_s = self._first_gb_per_s or now
        if now < self._first_gb_per_s / 2:
            self._console.warn(
                f"links have become slow: an all-reduce over all ranks runs at {now:.3g} GB/s, at first it was "
                f"{self._first_gb_per_s:.3g}"
            )
        return {"ranks/allreduce_gb_per_s": now}


def compare(seconds: Sequence[float], stages: Sequence[int]) -> dict[str, float]:
    """Ranks compared with those of the same pipeline stage: by its nature the first stage begins first and ends last.

    `ranks/slowest`, `ranks/slowest_ratio`: the rank with the largest multiple of its stage's median, and the multiple.
    `ranks/wait_share`: share of the time until the slowest of a stage is done that the ranks wait, over all ranks.
    """
    peers: dict[int, list[float]] = {}
    for own, stage in zip(seconds, stages, strict=True):
        peers.setdefault(stage, []).append(own)
    ratios = [own / (statistics.median(peers[stage]) or 1.0) for own, stage in zip(seconds, stages, strict=True)]
    slowest = max(range(len(ratios)), key=ratios.__getitem__)
    longest = sum(max(peers[stage]) for stage in stages)
    return {
        "ranks/slowest": float(slowest),
        "ranks/slowest_ratio": ratios[slowest],
        "ranks/wait_share": 1.0 - sum(seconds) / longest if longest else 0.0,
    }
