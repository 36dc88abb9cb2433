"""Detect straggler ranks from per-step compute time, and slow links from occasional all-reduce probes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_hdpo.health.config import HealthConfig
from megatron_hdpo.health.links import allreduce_gb_per_s
from megatron_hdpo.model.chunks import chunks_of
from megatron_hdpo.model.policy import Policy
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.parallel.location import RankLocation, locate_rank
from megatron_hdpo.tracking.console import Console

Moment = Any
"""Host seconds, or a CUDA event in this rank's stream."""


class ComputeClock:
    """Clock of a step's compute: from its first training forward pass to the start of its gradient reduction.

    The reduction is where data-parallel replicas first wait for each other in an update, so the time before it is a
    rank's own. Inside a replica ranks wait for each other in every layer, so they look equally slow. On a GPU two
    events are recorded per update and read when the step is over, so the clock adds no synchronisation before.

    host_seconds: the clock of a run on the CPU.
    """

    def __init__(self, device: torch.device, host_seconds: Callable[[], float] = time.perf_counter) -> None:
        self._device = device
        self._host_seconds = host_seconds
        self._began: Moment | None = None
        self._spans: list[tuple[Moment, Moment]] = []

    def attach(self, policy: Policy) -> None:
        """Time the policy's updates from now on; scoring has no gradients and is not timed."""
        chunks_of(policy.ddp)[0].register_forward_pre_hook(self._forward)
        config = policy.model.config
        config.finalize_model_grads_func = self._before_reduction(config.finalize_model_grads_func)

    def seconds(self) -> float:
        """Return the seconds of the updates since the last call, and start over."""
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
    """Watch for ranks and links that stay slow: `ranks/...` metrics of each step, and warnings. Collective.

    policy: the policy to time. first_gb_per_s: the all-reduce bandwidth that the health checks measured. host_seconds:
    the clock of a run on the CPU.
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
        self._locations: list[RankLocation] = context.gather_objects(
            locate_rank(context.rank, context.is_replica_leader)
        )
        self._stages: list[int] = context.gather_objects(context.groups.pp.rank())
        self._suspect, self._times = -1, 0

    def metrics(self, step: int) -> dict[str, float]:
        """Return the metrics of step `step`, counted from 1, after its updates; {} for a run of one rank."""
        own = self._clock.seconds()
        if len(self._locations) == 1:
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
                f"rank {slowest} on {self._locations[slowest].host} has been the slowest of {len(self._locations)} for "
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
    """Return metrics that compare each rank with the ranks of its pipeline stage.

    Stages are not compared with each other: the first stage always begins first and ends last. seconds, stages: by
    rank. `ranks/slowest`, `ranks/slowest_ratio`: the rank with the largest multiple of its stage's median, and the
    multiple. `ranks/wait_share`: share of the time until the slowest rank of a stage is done that ranks wait, over all
    ranks.
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
