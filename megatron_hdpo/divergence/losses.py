"""Losses from sharded logits in one pass: log-prob of the sampled token, entropy, and divergence to a target."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_hdpo.divergence import triton_pass
from megatron_hdpo.divergence.dense_pass import DensePass
from megatron_hdpo.divergence.kinds import JSD, DivergenceSpec, needs_dense
from megatron_hdpo.divergence.options import Options, Pass, Upstream
from megatron_hdpo.divergence.shard import VocabShard, compute_dtype
from megatron_hdpo.divergence.targets import Target, TopK, check_ids
from megatron_hdpo.divergence.teacher_rows import ScatteredTopK
from megatron_hdpo.divergence.topk_pass import TopKPass
from megatron_hdpo.types.transfer import to_device


@dataclass(frozen=True)
class Losses:
    """Per-token losses, float32 (float64 for float64 logits), in the leading shape of the logits.

    Differentiable: logprobs_T, ln q of the sampled token at the sampling temperature (0 where the id is -1; None
    without ids); entropy_T, the entropy of the same distribution in nats (None if not asked for); divergence_T, at the
    distillation temperature (None without a target; 0 for tokens that have none).
    Diagnostics without gradient, 0 for tokens that have no target, at the distillation temperature:
    student_mass_T, the student's mass on the support; covered_mass_T, the sum over the support of min(p^, q), with p^
    the teacher renormalised on the support and q the student's full softmax; teacher_top_T, q at the teacher's most
    likely token (the mean over them, if a full target has several).
    """

    logprobs_T: Tensor | None
    entropy_T: Tensor | None
    divergence_T: Tensor | None
    student_mass_T: Tensor | None = None
    covered_mass_T: Tensor | None = None
    teacher_top_T: Tensor | None = None


def logit_losses(
    logits_TV_local: Tensor,
    sampled_ids_T: Tensor | None,
    target: Target | None = None,
    *,
    spec: DivergenceSpec = JSD,
    distill_temperature: float = 1.0,
    temperature: float = 1.0,
    entropy: bool = True,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
) -> Losses:
    """Compute everything that a training step needs from the logits, in one differentiable pass; see `Losses`.

    logits_TV_local: [..., V / tp], this rank's contiguous shard of the vocabulary, finite. sampled_ids_T: int64 [...],
    global ids, -1 for tokens without one. target: TopK, FullLogits or Hidden; it may cover a subset of the tokens.
    spec: the divergence to the target. temperature: of log-probs and entropy. distill_temperature: divides the
    student's logits for the divergence, and the logits of a full target; a TopK target must already be at this
    temperature. There is no factor of temperature squared. vocab_size: tokens from this id on are padding, without
    probability or gradient. inplace_backward: the gradient overwrites the storage of the logits (only if they are
    contiguous); no other code may use the logits afterwards.
    Every rank of the group must call with the same shapes and options. Raises ValueError on shapes, ids, temperatures
    or a vocab_size that do not fit, and on a spec whose kind and tail cannot be combined.
    """
    lead, width = logits_TV_local.shape[:-1], logits_TV_local.shape[-1]
    logits_TV = logits_TV_local.reshape(-1, width)
    shard = VocabShard.of(width, group, vocab_size)
    options = Options(
        shard=shard,
        spec=spec,
        temperature=temperature,
        distill_temperature=distill_temperature,
        logprobs=sampled_ids_T is not None,
        entropy=entropy,
    )
    ids_T = None if sampled_ids_T is None else flat_ids(sampled_ids_T, lead, shard.vocab_size, logits_TV.device)
    flat = None if target is None else flat_target(target, logits_TV, shard)
    outputs = _LogitLosses.apply(logits_TV, ids_T, flat, options, inplace_backward)
    return Losses(*(None if out is None else out.view(lead) for out in outputs))


def divergence(
    logits_TV_local: Tensor,
    target: Target,
    spec: DivergenceSpec = JSD,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    """Compute the divergence of every token [...] to a target, differentiable in the logits.

    temperature: of the divergence (`distill_temperature` of logit_losses). Other arguments and errors as in
    logit_losses.
    """
    losses = logit_losses(
        logits_TV_local,
        None,
        target,
        spec=spec,
        distill_temperature=temperature,
        temperature=temperature,
        entropy=False,
        group=group,
        vocab_size=vocab_size,
        inplace_backward=inplace_backward,
    )
    assert losses.divergence_T is not None
    return losses.divergence_T


def vocab_parallel_entropy(
    logits_TV_local: Tensor,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    """Compute the entropy in nats of softmax(logits / temperature), [...], differentiable in the logits.

    Arguments and errors as in logit_losses.
    """
    losses = logit_losses(
        logits_TV_local,
        None,
        temperature=temperature,
        group=group,
        vocab_size=vocab_size,
        inplace_backward=inplace_backward,
    )
    assert losses.entropy_T is not None
    return losses.entropy_T


def flat_ids(ids_T: Tensor, lead: torch.Size, vocab_size: int, device: torch.device) -> Tensor:
    """Flatten sampled ids to int64 [T] on the device.

    Raises ValueError if their shape is not `lead`, the leading shape of the logits, or an id is beyond the vocabulary.
    """
    if ids_T.shape != lead:
        raise ValueError(f"sampled ids have shape {list(ids_T.shape)}, the logits' tokens {list(lead)}")
    flat_T = ids_T.detach().reshape(-1).to(device=device, dtype=torch.int64)
    check_ids(flat_T, vocab_size, "sampled_ids")
    return flat_T


def flat_target(target: Target, logits_TV: Tensor, shard: VocabShard) -> Target:
    """Flatten the target to 2-D tensors (and rows) on the device of the logits [T, V / tp].

    Raises ValueError if it does not fit.
    """
    width = shard.vocab_size if isinstance(target, TopK) else logits_TV.shape[1]
    flat = target.flat(logits_TV.shape[0], width, logits_TV.device)
    if flat.rows is None:
        return flat
    known = flat.rows if flat.rows.device.type == "cpu" else None
    return replace(flat, rows=to_device(flat.rows, logits_TV.device), host_rows=known)


def run_pass(logits_TV: Tensor, ids_T: Tensor | None, target: Target | None, options: Options) -> Pass:
    """Run one forward pass over flat inputs, with the implementation that suits the target.

    logits_TV: [T, V / tp]; ids_T: int64 [T] or None. Raises ValueError on a kind and tail that cannot be combined.
    """
    if target is not None and not isinstance(target, TopK):
        return DensePass.run(logits_TV, ids_T, target, options)
    if target is not None:
        options.spec.check_topk()
    if target is not None and needs_dense(options.spec):
        teacher = ScatteredTopK.of(target, options.shard, compute_dtype(logits_TV))
        return DensePass.run(logits_TV, ids_T, teacher, options)
    if triton_pass.suits(logits_TV, target, options):
        return triton_pass.TritonPass.run(logits_TV, ids_T, target, options)
    return TopKPass.run(logits_TV, ids_T, target, options)


class _LogitLosses(torch.autograd.Function):
    """Autograd node of one pass."""

    @staticmethod
    def forward(
        ctx: Any, logits_TV: Tensor, ids_T: Tensor | None, target: Target | None, options: Options, inplace: bool
    ) -> tuple[Tensor | None, ...]:
        made = run_pass(logits_TV, ids_T, target, options)
        ctx.set_materialize_grads(False)
        outputs = made.outputs.as_tuple()
        ctx.mark_non_differentiable(*(out for out in outputs[3:] if out is not None))
        ctx.save_for_backward(logits_TV)
        ctx.made, ctx.inplace = made.without_outputs(), inplace
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (logits_TV,) = ctx.saved_tensors
        return ctx.made.gradient(logits_TV, Upstream(*grads[:3]), inplace=ctx.inplace), None, None, None, None
