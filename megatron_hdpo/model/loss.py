"""The loss of a micro-batch on the last pipeline stage: clipped surrogate, KL to a reference, divergence to a target.

All terms are sums over tokens, divided by the token counts of the whole optimizer step. So the gradients of
micro-batches and replicas add up to the gradient of the step, however the sequences are packed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_hdpo.divergence import DivergenceSpec, Losses, head_loss, logit_losses
from megatron_hdpo.divergence.head_run import Chunk
from megatron_hdpo.model.micro_batch import LossInputs, MicroBatch
from megatron_hdpo.objectives.surrogate import clipped_surrogate
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

    def objective(losses: Losses, chunk: Chunk) -> Tensor:
        shift = None if shift_N is None else chunk.take(shift_N)
        return _loss(_terms(losses, inputs.select(chunk.take), spec, shift), spec, normalisers)

    distill = spec.distill or DivergenceConfig()
    total, losses = head_loss(
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
    with torch.no_grad():  # once for all tokens: a chunk would need some 40 kernels for them
        sums = _sums(_terms(losses, inputs, spec, shift_N), losses, inputs, normalisers)
    return total, sums


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


@dataclass(frozen=True)
class _Terms:
    """Terms of the loss of N tokens, [N] each, multiplied by the tokens' weights; None for one that is not used.

    clipped_N: whether the surrogate is clipped. old_N, rollout_N: the log-probs of the denominators.
    """

    surrogate_N: Tensor
    penalty_N: Tensor | None
    divergence_N: Tensor | None
    clipped_N: Tensor
    old_N: Tensor
    rollout_N: Tensor


def _terms(losses: Losses, inputs: LossInputs, spec: LossSpec, shift_N: Tensor | None) -> _Terms:
    """Compute the terms of some tokens from their losses and inputs, in one order."""
    assert losses.logprobs_T is not None
    own = losses.logprobs_T.detach()
    # Where the weight is zero, loss and gradient must be zero too. So no ratio is computed there: it might overflow.
    unweighted = inputs.surrogate_weights_N == 0
    old = torch.where(inputs.old_N.isnan() | unweighted, own, inputs.old_N)
    rollout = torch.where(inputs.rollout_N.isnan() | unweighted, old, inputs.rollout_N)
    shifted = old, rollout
    if shift_N is not None:
        # Subtracted from both denominators: the ratio becomes that of the sequence, while the importance weight (old to
        # rollout) does not change.
        shift = torch.where(unweighted, 0.0, shift_N)
        shifted = old - shift, rollout - shift
    surrogate = clipped_surrogate(losses.logprobs_T, *shifted, inputs.advantages_N, spec.surrogate)
    divergence = None
    if spec.distill is not None and losses.divergence_T is not None:
        divergence = losses.divergence_T * _distill_weights(own, inputs, spec.distill.importance_cap)
    return _Terms(
        surrogate_N=surrogate.loss_T * inputs.surrogate_weights_N,
        penalty_N=_penalty(losses.logprobs_T, inputs) if spec.kl_coefficient else None,
        divergence_N=divergence,
        clipped_N=surrogate.clipped_T,
        old_N=old,
        rollout_N=rollout,
    )


def _loss(terms: _Terms, spec: LossSpec, normalisers: TokenCounts) -> Tensor:
    """Compute the tokens' part of the loss, a scalar with gradient."""
    surrogate = terms.surrogate_N.sum()
    total = surrogate / normalisers.surrogate if normalisers.surrogate else surrogate * 0.0
    if terms.penalty_N is not None and normalisers.surrogate:
        total = total + spec.kl_coefficient * terms.penalty_N.sum() / normalisers.surrogate
    if spec.distill is not None and terms.divergence_N is not None and normalisers.distill:
        total = total + spec.distill.coefficient * terms.divergence_N.sum() / normalisers.distill
    return total


def _penalty(logprobs_N: Tensor, inputs: LossInputs) -> Tensor:
    """Compute the weighted k2 = (ln q - ln q_reference)^2 / 2 of each token; 0 where there is no reference.

    The gradient of k2, ln(q / q_reference) grad ln q, equals that of KL(q || q_reference) in expectation over q.
    """
    log_ratio = torch.where(_penalised(inputs), logprobs_N - inputs.reference_N, 0.0)
    return 0.5 * log_ratio.square() * inputs.surrogate_weights_N


def _penalised(inputs: LossInputs) -> Tensor:
    return ~inputs.reference_N.isnan() & (inputs.surrogate_weights_N != 0)


def _distill_weights(own_N: Tensor, inputs: LossInputs, cap: float | None) -> Tensor:
    """Return the weight of each token's divergence [N]; with a cap, multiplied by min(cap, q / q_sampled).

    q_sampled is the probability when the token was sampled: from the denominators, else from the engine. The factor is
    1 where neither is known, and where the token is not distilled.
    """
    if cap is None:
        return inputs.distill_weights_N
    sampled = torch.where(inputs.old_N.isnan(), inputs.rollout_N, inputs.old_N)
    idle = sampled.isnan() | (inputs.distill_weights_N == 0)
    return inputs.distill_weights_N * (own_N - torch.where(idle, own_N, sampled)).exp().clamp(max=cap)


def _sums(terms: _Terms, losses: Losses, inputs: LossInputs, normalisers: TokenCounts) -> dict[str, Tensor]:
    """Compute the sums (and MAXIMA) over all tokens of a micro-batch."""
    assert losses.logprobs_T is not None
    sums = _surrogate_sums(terms, losses, inputs) | _entropy_sums(losses, inputs)
    if terms.penalty_N is not None and normalisers.surrogate:
        there = _penalised(inputs)
        log_ratio = torch.where(there, losses.logprobs_T - inputs.reference_N, 0.0)
        sums |= {"reference_kl": log_ratio.sum(), "reference_tokens": there.sum()}
    if terms.divergence_N is not None and normalisers.distill:
        sums |= _distill_sums(terms.divergence_N, losses, inputs)
    return sums


def _surrogate_sums(terms: _Terms, losses: Losses, inputs: LossInputs) -> dict[str, Tensor]:
    """Compute sums over the tokens of the surrogate, those with a weight other than zero.

    The mismatch is ln r with r = trainer / engine, k3 = r - 1 - ln r. The trainer's probability is the one before the
    step's first update, so that updates of this step do not count as mismatch.
    """
    assert losses.logprobs_T is not None
    counted, mismatch = inputs.surrogate_weights_N != 0, terms.old_N - terms.rollout_N
    log_ratio = torch.where(counted, mismatch, 0.0)
    return {
        "surrogate": terms.surrogate_N.sum(),
        "surrogate_tokens": counted.sum(),
        "nll": -torch.where(counted, losses.logprobs_T, 0.0).sum(),
        "clipped": (terms.clipped_N & counted).sum(),
        "mismatch_k3": (log_ratio.exp() - 1 - log_ratio).sum(),
        "mismatch_abs": log_ratio.abs().sum(),
        "mismatch_max": _maximum(torch.where(counted, mismatch, -torch.inf)),  # of the log-ratio
    }


def _entropy_sums(losses: Losses, inputs: LossInputs) -> dict[str, Tensor]:
    """Compute the entropy, and the number, of the tokens of the student's own rollouts that have a weight in a loss."""
    assert losses.entropy_T is not None
    weighted = (inputs.surrogate_weights_N != 0) | (inputs.distill_weights_N != 0)
    counted = weighted & (inputs.own_N != 0)
    return {"entropy": torch.where(counted, losses.entropy_T, 0.0).sum(), "own_tokens": counted.sum()}


def _maximum(values_N: Tensor) -> Tensor:
    return values_N.amax() if len(values_N) else values_N.new_full((), -torch.inf)


def _distill_sums(divergence_N: Tensor, losses: Losses, inputs: LossInputs) -> dict[str, Tensor]:
    """Compute sums over the tokens with a target: divergence, and how much of the target the student covers.

    divergence_N: multiplied by the tokens' weights, as in the loss.
    """
    # Losses with a divergence have these too.
    assert losses.divergence_T is not None and losses.entropy_T is not None
    assert losses.covered_mass_T is not None and losses.teacher_top_T is not None
    targeted = inputs.distill_weights_N != 0
    return {
        "distill_loss": divergence_N.sum(),
        "divergence": torch.where(targeted, losses.divergence_T, 0.0).sum(),
        "distill_entropy": torch.where(targeted, losses.entropy_T, 0.0).sum(),
        "distill_tokens": targeted.sum(),
        "covered_mass": torch.where(targeted, losses.covered_mass_T, 0.0).sum(),
        "student_mass_at_top1": torch.where(targeted, losses.teacher_top_T, 0.0).sum(),
    }
