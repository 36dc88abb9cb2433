"""Metrics of an optimizer step, from sums over tokens on the last pipeline stages of all replicas."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hdpo.model.loss import Normalisers
from megatron_hdpo.objectives.interface import LossSpec
from megatron_hdpo.parallel.context import ParallelContext

_SUMS = (
    "surrogate", "surrogate_tokens", "nll", "clipped", "entropy", "mismatch_k3", "mismatch_abs",
    "divergence", "distill_tokens", "covered_mass", "student_mass_at_top1",
)  # fmt: skip


class TokenSums:
    """Sums over tokens by name; they stay on the device until the step is over."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Add a micro-batch's sums."""
        for name, value in sums.items():
            self._sums[name] = self._sums[name] + value.double() if name in self._sums else value.double()

    def values(self) -> list[float]:
        """In the order of the standard names, 0 for those never added."""
        if not self._sums:
            return [0.0] * len(_SUMS)
        zero = torch.zeros_like(next(iter(self._sums.values())))
        return torch.stack([self._sums.get(name, zero) for name in _SUMS]).tolist()


def sum_over_ranks(values: list[float], context: ParallelContext) -> list[float]:
    """Element-wise sums over all ranks, on every rank."""
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, group=context.host)
    return tensor.tolist()


def step_metrics(
    sums: TokenSums, tokens: int, normalisers: Normalisers, spec: LossSpec, context: ParallelContext
) -> dict[str, float]:
    """Metrics of the step, the same on every rank. tokens: run through the model by this replica. Collective."""
    holds_sums = context.is_last_stage and context.groups.tp.rank() == 0
    mine = sums.values() if holds_sums else [0.0] * len(_SUMS)
    reduced = sum_over_ranks([*mine, float(tokens) if context.is_replica_leader else 0.0], context)
    total = dict(zip((*_SUMS, "tokens"), reduced, strict=True))
    metrics = {"train/tokens": total["tokens"], "distill/tokens": total["distill_tokens"]}
    if normalisers.surrogate:
        metrics["train/surrogate_loss"] = total["surrogate"] / normalisers.surrogate
    if count := total["surrogate_tokens"]:
        metrics["train/clip_fraction"] = total["clipped"] / count
        for name in ("nll", "entropy", "mismatch_k3", "mismatch_abs"):
            metrics[f"train/{name}"] = total[name] / count
    if (count := total["distill_tokens"]) and spec.distill is not None:
        metrics[f"distill/{spec.distill.kind}"] = total["divergence"] / normalisers.distill
        metrics["distill/covered_mass"] = total["covered_mass"] / count
        metrics["distill/student_mass_at_top1"] = total["student_mass_at_top1"] / count
    return metrics
