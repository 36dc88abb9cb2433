"""Log-probs at given ids, and the k most likely tokens, from a softmax over a sharded vocabulary."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_hdpo.divergence.entries import OwnedEntries
from megatron_hdpo.divergence.options import gradient_storage
from megatron_hdpo.divergence.row_stats import SoftmaxTerm, local_stats, shift_stats, write_dense
from megatron_hdpo.divergence.shard import VocabShard, compute_dtype, row_blocks
from megatron_hdpo.divergence.targets import TopK, check_ids


def vocab_parallel_logprobs(
    logits_TV_local: Tensor,
    ids: Tensor,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    """Compute ln softmax(logits / temperature) at global ids, in the shape of the ids, differentiable in the logits.

    logits_TV_local: [..., V / tp]. ids: [...] or [..., K]; they may repeat, and id -1 gives 0 without gradient.
    Other arguments and dtypes as in logit_losses. Raises ValueError on a temperature that is not positive, ids beyond
    the vocabulary, or ids of another shape.
    """
    lead, width = logits_TV_local.shape[:-1], logits_TV_local.shape[-1]
    if ids.shape != lead and ids.shape[:-1] != lead:
        raise ValueError(f"ids have shape {list(ids.shape)}: the tokens' shape {list(lead)}, or that and K, is needed")
    if not temperature > 0.0:
        raise ValueError(f"temperature is {temperature}: it must be positive (greedy decoding counts as 1)")
    logits_TV = logits_TV_local.reshape(-1, width)
    shard = VocabShard.of(width, group, vocab_size)
    k = 1 if ids.shape == lead else ids.shape[-1]
    ids_TK = ids.detach().reshape(logits_TV.shape[0], k).to(device=logits_TV.device, dtype=torch.int64)
    check_ids(ids_TK, shard.vocab_size, "ids")
    out: Tensor = _LogProbs.apply(logits_TV, ids_TK, shard, temperature, inplace_backward)
    return out.view(ids.shape)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TV: Tensor, ids_TK: Tensor, shard: VocabShard, temperature: float, inplace: bool
    ) -> Tensor:
        stats = local_stats(logits_TV, shard, temperature)
        max_T = shard.all_reduce_max_(stats.ref_T.clone())
        stats = shift_stats(stats, max_T, temperature)
        sum_T, z_TK = shard.all_reduce_sum([stats.sum_T, _own_logits(logits_TV, ids_TK, shard)])
        lse_T = max_T / temperature + sum_T.log()
        ctx.shard, ctx.temperature, ctx.inplace = shard, temperature, inplace
        ctx.save_for_backward(logits_TV, ids_TK, lse_T)
        return (z_TK / temperature - lse_T.unsqueeze(-1)).masked_fill(ids_TK < 0, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits_TV, ids_TK, lse_T = ctx.saved_tensors
        owned = OwnedEntries.find(ids_TK, None, ctx.shard)
        g_TK = grads[0].masked_fill(ids_TK < 0, 0.0) / ctx.temperature
        total_T = -g_TK.sum(-1)
        # The values at the ids are computed in full precision before the dense write destroys the logits. Repeated
        # ids add up: each occurrence gets the sum over its column, so the order of the writes does not matter.
        row, col = owned.row, owned.col
        _, same = torch.unique(row * logits_TV.shape[1] + col, return_inverse=True)
        added = torch.zeros(same.numel(), dtype=lse_T.dtype, device=same.device)
        added.index_add_(0, same.flatten(), owned.pick(g_TK).flatten())
        q = (logits_TV[row, col].to(lse_T.dtype) / ctx.temperature - lse_T[row]).exp()
        value = q * total_T[row] + added[same]
        grad_TV = gradient_storage(logits_TV, ctx.inplace)
        write_dense(grad_TV, logits_TV, ctx.shard, [SoftmaxTerm(lse_T, ctx.temperature, total_T)])
        grad_TV[row, col] = value.to(grad_TV.dtype)
        return grad_TV, None, None, None, None


def _own_logits(logits_TV: Tensor, ids_TK: Tensor, shard: VocabShard) -> Tensor:
    """Return this rank's logits at the ids [T, K], 0 at ids of other ranks, in the compute dtype.

    Unlike OwnedEntries it does not wait for the device to count the ids of this rank.
    """
    col_TK = ids_TK - shard.start
    owned_TK = (col_TK >= 0) & (col_TK < shard.valid)
    found_TK = logits_TV.gather(-1, col_TK.clamp(0, shard.width - 1))
    return found_TK.to(compute_dtype(logits_TV)).masked_fill(~owned_TK, 0.0)


@torch.no_grad()
def vocab_parallel_topk(
    logits_TV_local: Tensor,
    k: int,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
) -> TopK:
    """Return the k most likely tokens, most likely first, with their log-probs in softmax(logits / temperature).

    The result ([..., k] ids and log-probs over the full vocabulary, without gradient) is the same on every rank and
    never holds padding. Collective: one all-gather of T (2 k + 2) numbers. Arguments as in logit_losses. Raises
    ValueError if k is below 1 or exceeds the vocabulary, or the temperature is not positive.
    """
    lead, width = logits_TV_local.shape[:-1], logits_TV_local.shape[-1]
    logits_TV = logits_TV_local.detach().reshape(-1, width)
    shard = VocabShard.of(width, group, vocab_size)
    if not 1 <= k <= shard.vocab_size:
        raise ValueError(f"top-k with k = {k}: it must lie between 1 and the vocabulary's {shard.vocab_size} tokens")
    if not temperature > 0.0:
        raise ValueError(f"temperature is {temperature}: it must be positive (greedy decoding counts as 1)")
    stats = local_stats(logits_TV, shard, temperature)
    values_TK, ids_TK = _local_topk(logits_TV, min(k, width), shard)
    packed = torch.cat([values_TK, bits(ids_TK, values_TK.dtype), stats.ref_T[:, None], stats.sum_T[:, None]], dim=-1)
    packed_DT = shard.all_gather(packed)  # [ranks, T, 2 n + 2]
    lse_T = _join_lse(packed_DT[..., -2], packed_DT[..., -1], temperature)
    n = values_TK.shape[1]
    all_values = packed_DT[..., :n].permute(1, 0, 2).flatten(1)
    all_ids = ints(packed_DT[..., n : 2 * n]).permute(1, 0, 2).flatten(1)
    best_TK, where_TK = all_values.topk(k, dim=-1)
    logprobs_TK = best_TK / temperature - lse_T.unsqueeze(-1)
    return TopK(all_ids.gather(-1, where_TK).view(*lead, k), logprobs_TK.view(*lead, k))


def _local_topk(logits_TV: Tensor, k: int, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Return the k largest logits of the shard with global ids; slots that it cannot fill hold -inf and id -1."""
    tokens, dtype = logits_TV.shape[0], compute_dtype(logits_TV)
    values_TK = torch.full((tokens, k), -torch.inf, dtype=dtype, device=logits_TV.device)
    ids_TK = torch.full((tokens, k), -1, dtype=torch.int64, device=logits_TV.device)
    n = min(k, shard.valid)
    if n:
        for block in row_blocks(tokens, shard.valid, logits_TV):
            value, col = logits_TV[block, : shard.valid].topk(n, dim=-1)
            values_TK[block, :n] = value.to(dtype)
            ids_TK[block, :n] = col + shard.start
    return values_TK, ids_TK


def bits(ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Reinterpret integers as floats, so that one collective can send both; `ints` is the inverse."""
    return ids.to(torch.int64 if dtype == torch.float64 else torch.int32).view(dtype)


def ints(floats: Tensor) -> Tensor:
    """Return the integers that `bits` packed, as int64."""
    return floats.contiguous().view(torch.int64 if floats.dtype == torch.float64 else torch.int32).to(torch.int64)


def _join_lse(max_DT: Tensor, sum_DT: Tensor, temperature: float) -> Tensor:
    """Join the ranks' maxima and sums [ranks, T] to the log-normaliser [T]."""
    max_T = max_DT.amax(0)
    scale_DT = ((max_DT - max_T) / temperature).clamp_min(-1e30).exp()
    return max_T / temperature + (sum_DT * scale_DT).sum(0).log()
