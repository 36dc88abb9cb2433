"""The loss of a micro-batch on the last pipeline stage: clipped surrogate plus divergence to a target.

Both are sums over tokens divided by normalisers of the whole optimizer step, so that gradients of micro-batches and
replicas add up to the gradient of the step, whatever the packing (global token counts).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_hdpo.divergence import Losses, head_loss
from megatron_hdpo.model.micro_batch import LossInputs, MicroBatch
from megatron_hdpo.objectives.interface import DistillConfig, LossSpec
from megatron_hdpo.objectives.surrogate import Surrogate, clipped_surrogate


@dataclass(frozen=True)
class Normalisers:
    """Global counts of the optimizer step; a term whose count is 0 is 0."""

    surrogate: float
    distill: float


def micro_batch_loss(
    hidden_NH: Tensor,
    head_weight_VH: Tensor,
    batch: MicroBatch,
    inputs: LossInputs,
    spec: LossSpec,
    normalisers: Normalisers,
    groups: ProcessGroupCollection,
    vocab_size: int,
    head_chunk: int = 1024,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss (a scalar with gradient) and detached sums over tokens, by metric name.

    hidden_NH: what the head reads at the rows of the N response tokens, whole on every tensor-parallel rank; its
    gradient comes back complete. head_weight_VH: this rank's shard of the head. Logits exist for `head_chunk` tokens
    at a time. All ranks of the tensor-parallel group must call it together, also with N = 0.
    """
    sums: dict[str, Tensor] = {}

    def objective(losses: Losses, places: Tensor) -> Tensor:
        total, chunk_sums = _chunk_loss(losses, inputs.at(places), spec, normalisers)
        for name, value in chunk_sums.items():
            sums[name] = sums[name] + value if name in sums else value
        return total

    distill = spec.distill or DistillConfig()
    total, _ = head_loss(
        hidden_NH,
        head_weight_VH,
        batch.sampled_ids_N,
        objective,
        inputs.target if spec.distill is not None else None,
        kind=distill.kind,
        beta=distill.beta,
        tail=distill.tail,
        clip=distill.clip,
        distill_temperature=distill.temperature,
        temperature=spec.temperature,
        chunk=head_chunk,
        group=groups.tp,
        vocab_size=vocab_size,
    )
    return total, sums


def _chunk_loss(
    losses: Losses, inputs: LossInputs, spec: LossSpec, normalisers: Normalisers
) -> tuple[Tensor, dict[str, Tensor]]:
    """A chunk's part of the loss, and its sums."""
    assert losses.logprobs_T is not None
    own = losses.logprobs_T.detach()
    # Where the weight is zero, loss and gradient must be zero too: there no ratio is made, which might overflow.
    unweighted = inputs.surrogate_weights_N == 0
    old = torch.where(inputs.old_N.isnan() | unweighted, own, inputs.old_N)
    rollout = torch.where(inputs.rollout_N.isnan() | unweighted, old, inputs.rollout_N)
    surrogate = clipped_surrogate(losses.logprobs_T, old, rollout, inputs.advantages_N, spec.surrogate)
    surrogate_sum = (surrogate.loss_T * inputs.surrogate_weights_N).sum()
    total = surrogate_sum / normalisers.surrogate if normalisers.surrogate else surrogate_sum * 0.0
    sums = _surrogate_sums(inputs, surrogate, surrogate_sum, own, rollout, losses)
    if spec.distill is not None and losses.divergence_T is not None and normalisers.distill:
        distill_sum = (losses.divergence_T * inputs.distill_weights_N).sum()
        total = total + spec.distill.coefficient * distill_sum / normalisers.distill
        sums |= _distill_sums(losses, inputs, distill_sum)
    return total, sums


def _surrogate_sums(
    inputs: LossInputs, surrogate: Surrogate, surrogate_sum: Tensor, own_N: Tensor, rollout_N: Tensor, losses: Losses
) -> dict[str, Tensor]:
    """Sums over the tokens of the surrogate (weight not zero). k3 = r - 1 - ln r with r = trainer / engine."""
    counted = inputs.surrogate_weights_N != 0
    log_ratio = torch.where(counted, own_N - rollout_N, 0.0)
    return {
        "surrogate": surrogate_sum.detach(),
        "surrogate_tokens": counted.sum(),
        "nll": -torch.where(counted, own_N, 0.0).sum(),
        "clipped": (surrogate.clipped_T & counted).sum(),
        "entropy": torch.where(counted, losses.entropy_T.detach(), 0.0).sum(),
        "mismatch_k3": (log_ratio.exp() - 1 - log_ratio).sum(),
        "mismatch_abs": log_ratio.abs().sum(),
    }


def _distill_sums(losses: Losses, inputs: LossInputs, distill_sum: Tensor) -> dict[str, Tensor]:
    """Sums over the tokens with a target: divergence, and how much of the target the student covers."""
    targeted = inputs.distill_weights_N != 0
    return {
        "divergence": distill_sum.detach(),
        "distill_tokens": targeted.sum(),
        "covered_mass": torch.where(targeted, losses.covered_mass_T, 0.0).sum(),
        "student_mass_at_top1": torch.where(targeted, losses.teacher_top_T, 0.0).sum(),
    }
