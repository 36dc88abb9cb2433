"""Metrics of an optimizer step, from sums and maxima over tokens on the last pipeline stages of all replicas."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hdpo.model.loss import MAXIMA, TokenCounts
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.types.learning import LossSpec
from megatron_hdpo.types.metrics import Metric, mean_over

_SUMS = (
    "surrogate", "surrogate_tokens", "nll", "clipped", "mismatch_k3", "mismatch_abs", "entropy", "own_tokens",
    "distill_loss", "divergence", "distill_tokens", "distill_entropy", "covered_mass", "student_mass_at_top1",
    "reference_kl", "reference_tokens",
)  # fmt: skip
_LARGEST_LOG = 700.0  # exp of a larger number overflows


class TokenSums:
    """Sums (and maxima) over tokens by name, kept on the device until the step is over."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Add a micro-batch's sums; of MAXIMA keep the larger value."""
        for name, value in sums.items():
            value, held = value.double(), self._sums.get(name)
            if held is not None:
                value = torch.maximum(held, value) if name in MAXIMA else held + value
            self._sums[name] = value

    def values(self) -> list[float]:
        """Return the values in the order of the standard names; 0 (-inf for a maximum) for names never added."""
        if not self._sums:
            return _initial_values()
        like = next(iter(self._sums.values()))
        missing = (torch.full_like(like, value) for value in _initial_values())
        names = (*_SUMS, *MAXIMA)
        return torch.stack([self._sums.get(name, value) for name, value in zip(names, missing, strict=True)]).tolist()


def _initial_values() -> list[float]:
    return [0.0] * len(_SUMS) + [-math.inf] * len(MAXIMA)


def sum_over_ranks(values: list[float], context: ParallelContext) -> list[float]:
    """Sum the values element by element over all ranks, on every rank. Collective."""
    return _over_ranks(values, dist.ReduceOp.SUM, context)


def _over_ranks(values: list[float], operation: dist.ReduceOp.RedOpType, context: ParallelContext) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, op=operation, group=context.host)
    return tensor.tolist()


def step_metrics(
    sums: TokenSums, tokens: int, normalisers: TokenCounts, spec: LossSpec, context: ParallelContext
) -> dict[str, float]:
    """Compute the metrics of the step, the same on every rank. Collective over all ranks.

    tokens: number of tokens that this replica ran through the model.
    """
    holds_sums = context.is_last_stage and context.groups.tp.rank() == 0
    values = sums.values() if holds_sums else _initial_values()
    mine, highest = values[: len(_SUMS)], values[len(_SUMS) :]
    reduced = sum_over_ranks([*mine, float(tokens) if context.is_replica_leader else 0.0], context)
    total = dict(zip((*_SUMS, "tokens"), reduced, strict=True))
    total |= dict(zip(MAXIMA, _over_ranks(highest, dist.ReduceOp.MAX, context), strict=True))
    metrics: dict[str, float] = {
        "train/tokens": Metric(total["tokens"], "sum"),
        "distill/tokens": Metric(total["distill_tokens"], "sum"),
    }
    if normalisers.surrogate:
        metrics["train/surrogate_loss"] = total["surrogate"] / normalisers.surrogate
    if count := total["surrogate_tokens"]:
        metrics["train/clip_fraction"] = mean_over(total["clipped"], count)
        for name in ("nll", "mismatch_k3", "mismatch_abs"):
            metrics[f"train/{name}"] = mean_over(total[name], count)
        metrics["train/mismatch_max"] = Metric(math.exp(min(total["mismatch_max"], _LARGEST_LOG)), "max")
    if count := total["own_tokens"]:
        metrics["train/entropy"] = mean_over(total["entropy"], count)
        metrics["train/entropy_tokens"] = Metric(count, "sum")
    if count := total["reference_tokens"]:
        metrics["train/reference_kl"] = mean_over(total["reference_kl"], count)
    if (count := total["distill_tokens"]) and spec.distill is not None:
        metrics["distill/loss"] = total["distill_loss"] / normalisers.distill
        metrics["distill/entropy"] = mean_over(total["distill_entropy"], count)
        for name in ("divergence", "covered_mass", "student_mass_at_top1"):
            metrics[f"distill/{name}"] = mean_over(total[name], count)
    return metrics
