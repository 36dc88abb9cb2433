"""Use of the machine in a step: tokens per second, model FLOP utilisation, memory peaks, bytes sent.

    perf/train_tokens_per_s_per_gpu     tokens that went forward and backward / time/train_s / ranks
    perf/rollout_tokens_per_s_per_gpu   tokens sampled, privileged too / time/rollout_s / ranks; not with rollouts ahead
    perf/step_tokens_per_s_per_gpu      prompt and response tokens of the student's rollouts / time/step_s / ranks
    perf/train_tflops_per_gpu           useful arithmetic of the updates / time/train_s / ranks
    perf/step_tflops_per_gpu            useful arithmetic of all phases on these devices / time/step_s / ranks
    perf/train_mfu, perf/step_mfu       the same over the device's peak; absent where no peak is known
    memory/device_peak_gib              most memory allocated by torch since the previous step, largest of any rank
    memory/device_reserved_gib          most memory reserved by torch since the previous step, largest of any rank
    memory/host_rss_gib                 largest resident memory of any rank's process at the end of the step
    comm/<kind>_<group>_bytes           see communication.py; largest of any rank

A "gpu" is a rank of the trainer, whatever its device. Arithmetic is counted by megatron_hdpo/costs/flops.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil
import torch

from megatron_hdpo.costs.cluster import peak_flops_s
from megatron_hdpo.costs.flops import decoding_flops, forward_flops
from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.tracking.communication import TrainingTraffic
from megatron_hdpo.tracking.names import STEP_SECONDS
from megatron_hdpo.tracking.work import FlopCounter
from megatron_hdpo.types.rollouts import GroupOutline

_GIB = 2**30


@dataclass(frozen=True)
class Sampled:
    """Amounts sampled in a step, by the student and with privileged prompts.

    tokens: tokens of all responses. whole: tokens of the student's responses, each with its prompt. flops: of prefills
    (one per prompt) and decoding.
    """

    tokens: int
    whole: int
    flops: float


NOTHING = Sampled(0, 0, 0.0)


@dataclass(frozen=True)
class RankAmounts:
    """One rank's amounts of a step, to be reduced over all ranks.

    train_flops, score_flops: added up; 0 on all ranks of a replica but one. largest: metrics of which the largest of
    any rank counts, by name; a rank may lack some.
    """

    train_flops: float
    score_flops: float
    largest: dict[str, float]


def sampled(architecture: Architecture, groups: Sequence[GroupOutline]) -> Sampled:
    """Return the amounts that the groups of a step sampled."""
    tokens, whole, flops = 0, 0, 0.0
    for group in groups:
        whole += sum(group.prompt_length + sample.length for sample in group.samples)
        for prompt, samples in (
            (group.prompt_length, group.samples),
            (group.privileged_prompt_length, group.privileged_samples),
        ):
            if not samples:
                continue
            tokens += sum(sample.length for sample in samples)
            flops += forward_flops(architecture, [(prompt, 0)])
            flops += sum(decoding_flops(architecture, prompt, sample.length) for sample in samples)
    return Sampled(tokens, whole, flops)


def device_peak(device: torch.device, peak_tflops: float | None) -> float | None:
    """Return the FLOP/s that MFU is measured against; None where no peak is known.

    The recipe's value counts first, then the known device's dense bf16 peak.
    """
    if peak_tflops is not None:
        return peak_tflops * 1e12
    return peak_flops_s(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


class Performance:
    """Performance metrics of a step.

    peak_flops_s: peak of one device, None where it is not known. samples_here: rollouts are sampled on the trainer's
    devices, so their arithmetic counts for these. waits: a step waits for its rollouts (none are sampled ahead).
    """

    def __init__(
        self,
        architecture: Architecture,
        context: ParallelContext,
        work: FlopCounter,
        traffic: TrainingTraffic | None,
        *,
        peak_flops_s: float | None,
        samples_here: bool,
        waits: bool,
    ) -> None:
        self.architecture, self.context, self.work, self.traffic = architecture, context, work, traffic
        self.peak_flops_s, self.samples_here, self.waits = peak_flops_s, samples_here, waits
        self._sampled = NOTHING

    def begin(self) -> None:
        """Reset the counters at the start of a step."""
        self.work.take()
        self._sampled = NOTHING
        if self.traffic is not None:
            self.traffic.take()
        if self.context.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.context.device)

    def rollouts(self, groups: Sequence[GroupOutline]) -> None:
        """Count all groups that were sampled for the step, including those that it will not learn from."""
        self._sampled = sampled(self.architecture, groups)

    def metrics(self, known: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics of the step that ends now. Collective.

        known: the step's other metrics, with `time/`.
        """
        ranks = self.context.gather_objects(self._own())
        train, score = sum(rank.train_flops for rank in ranks), sum(rank.score_flops for rank in ranks)
        made = self._sampled
        every = train + score + (made.flops if self.samples_here else 0.0)
        rates = {
            "train_tokens_per_s": _rate(known.get("train/tokens"), known.get("time/train_s")),
            "rollout_tokens_per_s": _rate(made.tokens, known.get("time/rollout_s")) if self.waits else None,
            "step_tokens_per_s": _rate(made.whole, known.get(STEP_SECONDS)),
        }
        metrics = {f"perf/{name}_per_gpu": rate / len(ranks) for name, rate in rates.items() if rate}
        for name, flops, seconds in (("train", train, "time/train_s"), ("step", every, STEP_SECONDS)):
            metrics |= self._arithmetic(name, _rate(flops, known.get(seconds)))
        names = sorted({name for rank in ranks for name in rank.largest})
        return metrics | {name: max(rank.largest.get(name, 0) for rank in ranks) for name in names}

    def _arithmetic(self, name: str, flops_s: float | None) -> dict[str, float]:
        if not flops_s:
            return {}
        each = flops_s / self.context.world_size
        metrics = {f"perf/{name}_tflops_per_gpu": each / 1e12}
        return metrics if self.peak_flops_s is None else metrics | {f"perf/{name}_mfu": each / self.peak_flops_s}

    def _own(self) -> RankAmounts:
        """Return this rank's amounts; one rank of a replica reports the replica's arithmetic."""
        train, score = self.work.take()
        if not self.context.is_replica_leader:
            train, score = 0.0, 0.0
        largest: dict[str, float] = {"memory/host_rss_gib": psutil.Process().memory_info().rss / _GIB}
        if self.context.device.type == "cuda":
            device = self.context.device
            largest["memory/device_peak_gib"] = torch.cuda.max_memory_allocated(device) / _GIB
            largest["memory/device_reserved_gib"] = torch.cuda.max_memory_reserved(device) / _GIB
        return RankAmounts(train, score, largest | (self.traffic.take() if self.traffic is not None else {}))


def over_longer_step(metrics: Mapping[str, float], seconds: float) -> dict[str, float]:
    """Return the rates of a whole step, corrected for its final length of `seconds`."""
    longer = seconds / metrics[STEP_SECONDS]
    return {name: value / longer for name, value in metrics.items() if name.startswith("perf/step_")}


def _rate(amount: float | None, seconds: float | None) -> float | None:
    return amount / seconds if amount and seconds else None
