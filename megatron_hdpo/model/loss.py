"""The loss of a micro-batch on the last pipeline stage: clipped surrogate, KL to a reference, divergence to a target.

All terms are sums over tokens, divided by the token counts of the whole optimizer step. So the gradients of
micro-batches and replicas add up to the gradient of the step, however the sequences are packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_hdpo.divergence import DivergenceSpec, Losses, head_loss, logit_losses
from megatron_hdpo.model.micro_batch import LossInputs, MicroBatch
from megatron_hdpo.objectives.surrogate import Surrogate, clipped_surrogate
from megatron_hdpo.types.learning import DivergenceConfig, LossSpec

MAXIMA = ("mismatch_max",)
"""Names of the numbers of `micro_batch_loss` that are maxima over tokens; all others are sums."""


@dataclass(frozen=True)
class TokenCounts:
    """Global token counts of the optimizer step, by which the loss terms are divided; a term with count 0 is 0."""

    surrogate: float
    distill: float


def micro_batch_loss(
    hidden_NH: Tensor,
    head_weight_VH: Tensor,
    batch: MicroBatch,
    inputs: LossInputs,
    spec: LossSpec,
    normalisers: TokenCounts,
    groups: ProcessGroupCollection,
    vocab_size: int,
    head_chunk: int = 1024,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss (a scalar with gradient) and detached sums (and MAXIMA) over tokens, by metric name.

    hidden_NH: the input of the head for the N response tokens, whole on every tensor-parallel rank; its gradient comes
    back complete. head_weight_VH: [V / tp, H], this rank's shard of the head. Logits exist for `head_chunk` tokens at
    a time. All ranks of the tensor- and context-parallel groups must call it together, also with N = 0.
    """
    sums: dict[str, Tensor] = {}
    shift_N = None
    if spec.surrogate.ratio == "sequence" and inputs.moved:
        own_N = _own_logprobs(
            hidden_NH,
            head_weight_VH,
            batch.sampled_ids_N,
            temperature=spec.temperature,
            groups=groups,
            vocab_size=vocab_size,
            head_chunk=head_chunk,
        )
        shift_N = _sequence_shift(own_N, inputs, batch, groups)

    def objective(losses: Losses, places: Tensor) -> Tensor:
        shift = None if shift_N is None else shift_N[places]
        total, chunk_sums = _chunk_loss(losses, inputs.at(places), spec, normalisers, shift)
        merge_sums(sums, chunk_sums)
        return total

    distill = spec.distill or DivergenceConfig()
    total, _ = head_loss(
        hidden_NH,
        head_weight_VH,
        batch.sampled_ids_N,
        objective,
        inputs.target if spec.distill is not None else None,
        spec=DivergenceSpec(kind=distill.kind, beta=distill.beta, tail=distill.tail, clip=distill.clip),
        distill_temperature=distill.temperature,
        temperature=spec.temperature,
        chunk=head_chunk,
        group=groups.tp,
        vocab_size=vocab_size,
    )
    return total, sums


def merge_sums(sums: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    """Add the sums of other tokens to `sums`, in place; of MAXIMA keep the larger value."""
    for name, value in more.items():
        if name in sums:
            value = torch.maximum(sums[name], value) if name in MAXIMA else sums[name] + value
        sums[name] = value


@torch.no_grad()
def _own_logprobs(
    hidden_NH: Tensor,
    head_weight_VH: Tensor,
    sampled_ids_N: Tensor,
    *,
    temperature: float,
    groups: ProcessGroupCollection,
    vocab_size: int,
    head_chunk: int,
) -> Tensor:
    """Compute the log-probs [N] of the sampled tokens under the current weights, chunk by chunk through the head."""
    parts = []
    for hidden, sampled in zip(hidden_NH.split(head_chunk), sampled_ids_N.split(head_chunk), strict=True):
        losses = logit_losses(
            F.linear(hidden, head_weight_VH),
            sampled,
            temperature=temperature,
            entropy=False,
            group=groups.tp,
            vocab_size=vocab_size,
        )
        assert losses.logprobs_T is not None
        parts.append(losses.logprobs_T)
    return torch.cat(parts)


def _sequence_shift(own_N: Tensor, inputs: LossInputs, batch: MicroBatch, groups: ProcessGroupCollection) -> Tensor:
    """Return [N] the term that, added to a token's log-ratio, makes it the mean log-ratio of its response."""
    log_ratio = batch.whole(torch.where(inputs.old_N.isnan(), 0.0, own_N - inputs.old_N), groups.cp)
    parts = log_ratio.split(batch.responses)
    return batch.own(torch.cat([part.sum() / max(len(part), 1) - part for part in parts]))


def _chunk_loss(
    losses: Losses, inputs: LossInputs, spec: LossSpec, normalisers: TokenCounts, shift_N: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute a chunk's part of the loss, and its sums."""
    assert losses.logprobs_T is not None
    own = losses.logprobs_T.detach()
    # Where the weight is zero, loss and gradient must be zero too. So no ratio is computed there: it might overflow.
    unweighted = inputs.surrogate_weights_N == 0
    old = torch.where(inputs.old_N.isnan() | unweighted, own, inputs.old_N)
    rollout = torch.where(inputs.rollout_N.isnan() | unweighted, old, inputs.rollout_N)
    # The shift is subtracted from both denominators: the ratio becomes that of the sequence, while the importance
    # weight (old to rollout) does not change.
    shift = 0.0 if shift_N is None else torch.where(unweighted, 0.0, shift_N)
    surrogate = clipped_surrogate(losses.logprobs_T, old - shift, rollout - shift, inputs.advantages_N, spec.surrogate)
    surrogate_sum = (surrogate.loss_T * inputs.surrogate_weights_N).sum()
    total = surrogate_sum / normalisers.surrogate if normalisers.surrogate else surrogate_sum * 0.0
    sums = _surrogate_sums(inputs, surrogate, losses, surrogate_sum=surrogate_sum, own_N=own, mismatch_N=old - rollout)
    if spec.kl_coefficient and normalisers.surrogate:
        penalty_sum, kl_sums = _penalty(losses.logprobs_T, inputs)
        total = total + spec.kl_coefficient * penalty_sum / normalisers.surrogate
        sums |= kl_sums
    if spec.distill is not None and losses.divergence_T is not None and normalisers.distill:
        weights = inputs.distill_weights_N * _sampling_weights(own, inputs, spec.distill.importance_cap)
        distill_sum = (losses.divergence_T * weights).sum()
        total = total + spec.distill.coefficient * distill_sum / normalisers.distill
        sums |= _distill_sums(losses, inputs, distill_sum)
    return total, sums


def _penalty(logprobs_N: Tensor, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the weighted sum of k2 = (ln q - ln q_reference)^2 / 2 over tokens, and its metrics.

    The gradient of k2, ln(q / q_reference) grad ln q, equals that of KL(q || q_reference) in expectation over q.
    """
    there = ~inputs.reference_N.isnan() & (inputs.surrogate_weights_N != 0)
    log_ratio = torch.where(there, logprobs_N - inputs.reference_N, 0.0)
    penalty = (0.5 * log_ratio.square() * inputs.surrogate_weights_N).sum()
    return penalty, {"reference_kl": log_ratio.detach().sum(), "reference_tokens": there.sum()}


def _sampling_weights(own_N: Tensor, inputs: LossInputs, cap: float | None) -> Tensor | float:
    """Return the importance weight min(cap, q / q_sampled) of each token [N]; 1 without a cap.

    q_sampled is the probability when the token was sampled: from the denominators, else from the engine. The weight is
    1 where neither is known, and where the token is not distilled.
    """
    if cap is None:
        return 1.0
    sampled = torch.where(inputs.old_N.isnan(), inputs.rollout_N, inputs.old_N)
    idle = sampled.isnan() | (inputs.distill_weights_N == 0)
    return (own_N - torch.where(idle, own_N, sampled)).exp().clamp(max=cap)


def _surrogate_sums(
    inputs: LossInputs,
    surrogate: Surrogate,
    losses: Losses,
    *,
    surrogate_sum: Tensor,
    own_N: Tensor,
    mismatch_N: Tensor,
) -> dict[str, Tensor]:
    """Compute sums over the tokens of the surrogate, those with a weight other than zero.

    mismatch_N: ln r with r = trainer / engine, k3 = r - 1 - ln r. The trainer's probability is the one before the
    step's first update, so that updates of this step do not count as mismatch.
    """
    assert losses.entropy_T is not None
    counted = inputs.surrogate_weights_N != 0
    log_ratio = torch.where(counted, mismatch_N, 0.0)
    return {
        "surrogate": surrogate_sum.detach(),
        "surrogate_tokens": counted.sum(),
        "nll": -torch.where(counted, own_N, 0.0).sum(),
        "clipped": (surrogate.clipped_T & counted).sum(),
        "entropy": torch.where(counted, losses.entropy_T.detach(), 0.0).sum(),
        "mismatch_k3": (log_ratio.exp() - 1 - log_ratio).sum(),
        "mismatch_abs": log_ratio.abs().sum(),
        "mismatch_max": _maximum(torch.where(counted, mismatch_N, -torch.inf)),  # of the log-ratio
    }


def _maximum(values_N: Tensor) -> Tensor:
    return values_N.amax() if len(values_N) else values_N.new_full((), -torch.inf)


def _distill_sums(losses: Losses, inputs: LossInputs, distill_sum: Tensor) -> dict[str, Tensor]:
    """Compute sums over the tokens with a target: divergence, and how much of the target the student covers."""
    # Losses with a divergence have these too.
    assert losses.covered_mass_T is not None and losses.teacher_top_T is not None
    targeted = inputs.distill_weights_N != 0
    return {
        "divergence": distill_sum.detach(),
        "distill_tokens": targeted.sum(),
        "covered_mass": torch.where(targeted, losses.covered_mass_T, 0.0).sum(),
        "student_mass_at_top1": torch.where(targeted, losses.teacher_top_T, 0.0).sum(),
    }
