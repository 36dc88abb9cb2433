"""Losses from hidden states through the head, chunk by chunk, without ever making a [T, V] tensor.

A chunk of tokens goes through the head's matrix product, the pass over its logits and, in the backward, the gradient
and its two matrix products; all chunks share one buffer of [chunk, V / tp]. There are two ways to the gradient:

    head_losses   returns per-token losses for any objective. Its backward computes each chunk's logits a second time
                  (four matrix products instead of three), because the objective's gradient is not yet known in the
                  forward.
    head_loss     takes the objective as a function of a chunk's losses, and therefore runs head, loss and gradient of
                  each chunk at once (three products); its backward only scales the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_hdpo.divergence.head_run import Chunk, HeadRun, join_chunks
from megatron_hdpo.divergence.kinds import JSD, DivergenceSpec
from megatron_hdpo.divergence.losses import Losses
from megatron_hdpo.divergence.options import Options, Outputs, Upstream
from megatron_hdpo.divergence.targets import Target

# A chunk's part of the objective: (losses of the chunk's n tokens, the chunk) -> scalar.
ChunkObjective = Callable[[Losses, Chunk], Tensor]


def head_losses(
    hidden_TH: Tensor,
    head_weight_VH: Tensor,
    sampled_ids_T: Tensor,
    target: Target | None = None,
    *,
    spec: DivergenceSpec = JSD,
    distill_temperature: float = 1.0,
    temperature: float = 1.0,
    entropy: bool = True,
    chunk: int = 1024,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    sequence_parallel: bool = False,
) -> Losses:
    """Compute the losses of logit_losses for logits hidden @ head^T, differentiable in hidden states and head weight.

    hidden_TH: [..., H], the input of the head (after the final norm), whole on every rank of the group; or, with
    sequence_parallel, this rank's contiguous part of the first dimension (all ranks hold equal parts), which is
    gathered chunk by chunk. head_weight_VH: [V / tp, H], this rank's shard. sampled_ids_T (int64 [...], -1 for none)
    and the target cover ALL tokens on every rank. chunk: tokens per chunk (under sequence_parallel rounded up to a
    multiple of the number of ranks).

    The gradient of the hidden states is complete: it is summed over the group here (one all-reduce of [T, H], or, under
    sequence_parallel, one reduce-scatter per chunk), so no other layer may sum it over the group again. The gradient of
    the head weight is accumulated in float32 (float64). Other arguments and errors as in logit_losses.
    """
    run = HeadRun.of(
        hidden_TH,
        head_weight_VH,
        sampled_ids_T,
        target,
        chunk=chunk,
        group=group,
        vocab_size=vocab_size,
        sequence_parallel=sequence_parallel,
    )
    options = Options(
        shard=run.shard,
        spec=spec,
        temperature=temperature,
        distill_temperature=distill_temperature,
        logprobs=True,
        entropy=entropy,
    )
    outputs = _HeadLosses.apply(hidden_TH.reshape(-1, hidden_TH.shape[-1]), head_weight_VH, run, options)
    return Losses(*(None if out is None else out.view(sampled_ids_T.shape) for out in outputs))


def head_loss(
    hidden_TH: Tensor,
    head_weight_VH: Tensor,
    sampled_ids_T: Tensor,
    objective: ChunkObjective,
    target: Target | None = None,
    *,
    spec: DivergenceSpec = JSD,
    distill_temperature: float = 1.0,
    temperature: float = 1.0,
    entropy: bool = True,
    chunk: int = 1024,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    sequence_parallel: bool = False,
) -> tuple[Tensor, Losses]:
    """Compute the objective summed over chunks, differentiable in hidden states and head weight, and the losses.

    objective(losses, chunk) gets a chunk's Losses (1-D; log-prob, entropy and divergence with gradient) and the chunk,
    whose `take` selects its tokens' values from those of all tokens, and returns the chunk's scalar contribution, the
    same on every rank of the group. It runs inside the forward; only gradients through the chunk's losses are used. The
    returned losses are detached. Other arguments and errors as in head_losses; a second backward raises RuntimeError.
    """
    run = HeadRun.of(
        hidden_TH,
        head_weight_VH,
        sampled_ids_T,
        target,
        chunk=chunk,
        group=group,
        vocab_size=vocab_size,
        sequence_parallel=sequence_parallel,
    )
    options = Options(
        shard=run.shard,
        spec=spec,
        temperature=temperature,
        distill_temperature=distill_temperature,
        logprobs=True,
        entropy=entropy,
    )
    flat_TH = hidden_TH.reshape(-1, hidden_TH.shape[-1])
    wants = hidden_TH.requires_grad, head_weight_VH.requires_grad
    total, *outputs = _HeadLoss.apply(flat_TH, head_weight_VH, run, options, objective, wants)
    return total, Losses(*(None if out is None else out.view(sampled_ids_T.shape) for out in outputs))


class _Gradients:
    """Accumulator of the gradients of hidden states and head weight over chunks."""

    def __init__(self, hidden_TH: Tensor, head_weight_VH: Tensor, run: HeadRun, wants: Sequence[bool]) -> None:
        self.run, self.weight_VH = run, head_weight_VH
        wide = torch.float64 if head_weight_VH.dtype == torch.float64 else torch.float32
        self.hidden_TH = torch.empty_like(hidden_TH) if wants[0] else None
        self.head_VH = torch.zeros(head_weight_VH.shape, dtype=wide, device=hidden_TH.device) if wants[1] else None

    def add(self, chunk: Chunk, grad_CV: Tensor, hidden_CH: Tensor) -> None:
        if self.hidden_TH is not None:
            own_CH = self.hidden_TH[chunk.local]
            if self.run.sequence_parallel:
                own_CH.copy_(self.run.scatter_sum(grad_CV @ self.weight_VH))
            else:
                torch.mm(grad_CV, self.weight_VH, out=own_CH)
        if self.head_VH is not None:
            _add_product(self.head_VH, grad_CV.t(), hidden_CH)

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients in the dtypes of their inputs, that of the hidden states summed over the group."""
        shard = self.run.shard
        if self.hidden_TH is not None and not self.run.sequence_parallel and shard.size > 1:
            dist.all_reduce(self.hidden_TH, group=shard.group)
        head_VH = None if self.head_VH is None else self.head_VH.to(self.weight_VH.dtype)
        return self.hidden_TH, head_VH


def _add_product(sum_VH: Tensor, left_VC: Tensor, right_CH: Tensor) -> None:
    """Add a matrix product to `sum_VH`, in place, without rounding the product to a narrower dtype on a GPU."""
    if sum_VH.dtype == left_VC.dtype:
        sum_VH.addmm_(left_VC, right_CH)
    elif sum_VH.is_cuda:
        torch.addmm(sum_VH, left_VC, right_CH, out_dtype=sum_VH.dtype, out=sum_VH)
    else:  # no such product on a CPU
        sum_VH += left_VC @ right_CH


def _joined(outputs: Sequence[Outputs], run: HeadRun, options: Options, like: Tensor) -> tuple[Tensor | None, ...]:
    """Join the outputs of the chunks to those of all tokens, [T] each; a run over no tokens has them too, empty."""
    if not run.chunks:
        logits, nothing = like.new_empty((0, run.shard.width)), slice(0, 0)
        return run.run_chunk(logits, Chunk(nothing, [nothing], [nothing]), options).outputs.as_tuple()
    joined: list[Tensor | None] = []
    for parts in zip(*(out.as_tuple() for out in outputs), strict=True):
        given = [part for part in parts if part is not None]  # of all chunks or of none
        joined.append(join_chunks(given, run.chunks) if given else None)
    return tuple(joined)


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, head_weight_VH: Tensor, run: HeadRun, options: Options
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        collected: list[Outputs] = []
        ctx.passes, buffer = [], run.buffer(hidden_TH)
        for chunk in run.chunks:
            logits_CV = _logits(run.gather(hidden_TH[chunk.local]), head_weight_VH, buffer)
            made = run.run_chunk(logits_CV, chunk, options, remake=True)
            collected.append(made.outputs)
            ctx.passes.append(made.without_outputs())
        ctx.run, ctx.buffer = run, buffer
        ctx.save_for_backward(hidden_TH, head_weight_VH)
        outputs = _joined(collected, run, options, hidden_TH)
        ctx.mark_non_differentiable(*(out for out in outputs[3:] if out is not None))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_TH, head_weight_VH = ctx.saved_tensors
        run: HeadRun = ctx.run
        sums = _Gradients(hidden_TH, head_weight_VH, run, ctx.needs_input_grad)
        # In reverse order: the last chunk's logits are still in the buffer, unless an earlier backward overwrote them.
        in_buffer, buffer = ctx.buffer is not None, ctx.buffer if ctx.buffer is not None else run.buffer(hidden_TH)
        ctx.buffer = None
        for chunk, made in zip(reversed(run.chunks), reversed(ctx.passes), strict=True):
            hidden_CH = run.gather(hidden_TH[chunk.local])
            logits_CV = buffer[: len(hidden_CH)] if in_buffer else _logits(hidden_CH, head_weight_VH, buffer)
            in_buffer = False
            upstream = Upstream(*(None if g is None else chunk.take(g) for g in grads[:3]))
            sums.add(chunk, made.gradient(logits_CV, upstream, inplace=True), hidden_CH)
        return *sums.finish(), None, None


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        head_weight_VH: Tensor,
        run: HeadRun,
        options: Options,
        objective: ChunkObjective,
        wants: tuple[bool, bool],
    ) -> tuple[Tensor | None, ...]:
        sums, collected = _Gradients(hidden_TH, head_weight_VH, run, wants), list[Outputs]()
        total, buffer = None, run.buffer(hidden_TH)
        for chunk in run.chunks:
            hidden_CH = run.gather(hidden_TH[chunk.local])
            logits_CV = _logits(hidden_CH, head_weight_VH, buffer)
            made = run.run_chunk(logits_CV, chunk, options)
            value, upstream = _evaluate(objective, made.outputs, chunk)
            total = value if total is None else total + value
            collected.append(made.outputs)
            if any(wants):
                sums.add(chunk, made.gradient(logits_CV, upstream, inplace=True), hidden_CH)
        ctx.grads = sums.finish()
        outputs = _joined(collected, run, options, hidden_TH)
        ctx.mark_non_differentiable(*(out for out in outputs if out is not None))
        return (hidden_TH.new_zeros((), dtype=torch.float32) if total is None else total), *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("head_loss: its backward has already run and released the gradients; call it again")
        (hidden_TH, head_VH), ctx.grads = ctx.grads, None
        scaled = (None if g is None or grads[0] is None else g.mul_(grads[0].to(g.dtype)) for g in (hidden_TH, head_VH))
        return *scaled, None, None, None, None


def _logits(hidden_CH: Tensor, head_weight_VH: Tensor, buffer: Tensor) -> Tensor:
    """Compute the logits of a chunk, in the buffer that all chunks share."""
    return torch.mm(hidden_CH, head_weight_VH.t(), out=buffer[: len(hidden_CH)])


def _evaluate(objective: ChunkObjective, outputs: Outputs, chunk: Chunk) -> tuple[Tensor, Upstream]:
    """Evaluate the objective on a chunk; return its value and its gradient with respect to the chunk's losses."""
    main = [None if out is None else out.detach().requires_grad_() for out in outputs.as_tuple()[:3]]
    with torch.enable_grad():
        value = objective(Losses(*main, *outputs.as_tuple()[3:]), chunk)
    if not value.requires_grad:
        return value.detach(), Upstream(None, None, None)
    given = [x for x in main if x is not None]
    grads = iter(torch.autograd.grad(value, given, allow_unused=True))
    return value.detach(), Upstream(*(None if x is None else next(grads) for x in main))
