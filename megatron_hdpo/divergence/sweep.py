"""One read of the logits for the row statistics from which every quantity follows; one write of the gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hdpo.divergence.shard import OwnedEntries, Shard, compute_dtype, row_blocks


@dataclass(frozen=True)
class RowStats:
    """Of one rank: max_T of the logits, and sums over its columns of e = exp((z - max) / temperature).

    energy_T: sum of e * (z - max) / temperature, for the entropy. rest_T: sum of e outside the support.
    """

    max_T: Tensor
    sum_T: Tensor
    energy_T: Tensor | None
    rest_T: Tensor | None


def local_stats(
    logits_TV: Tensor, shard: Shard, temperature: float, *, entropy: bool = False, holes: OwnedEntries | None = None
) -> RowStats:
    """Row statistics of a shard. holes: the support's entries, left out of rest_T."""
    tokens, dtype, device = logits_TV.shape[0], compute_dtype(logits_TV), logits_TV.device
    max_T = torch.full((tokens,), -torch.inf, dtype=dtype, device=device)
    sum_T = torch.zeros(tokens, dtype=dtype, device=device)
    energy_T = torch.zeros_like(sum_T) if entropy else None
    rest_T = torch.zeros_like(sum_T) if holes is not None else None
    stats = RowStats(max_T, sum_T, energy_T, rest_T)
    if not shard.valid or not tokens:
        return stats
    blocks = list(row_blocks(tokens, shard.valid, logits_TV))
    height = blocks[0].stop
    scratch = torch.empty((2 if entropy else 1, height, shard.valid), dtype=dtype, device=device)
    parts = holes.within(blocks) if holes is not None else [slice(0, 0)] * len(blocks)
    for block, part in zip(blocks, parts, strict=True):
        _block_stats(logits_TV[block, : shard.valid], stats, block, temperature, scratch)
        if holes is not None and rest_T is not None:
            e = scratch[-1, : block.stop - block.start]
            e[holes.row_N[part] - block.start, holes.col_N[part]] = 0.0
            torch.sum(e, dim=-1, out=rest_T[block])
    return stats


def _block_stats(z: Tensor, stats: RowStats, block: slice, temperature: float, scratch: Tensor) -> None:
    """Statistics of one block of rows; leaves e in the last scratch."""
    rows = z.shape[0]
    d, e = scratch[0, :rows], scratch[-1, :rows]
    if z.dtype != d.dtype:
        z = d.copy_(z)
    torch.amax(z, dim=-1, out=stats.max_T[block])
    torch.sub(z, stats.max_T[block].unsqueeze(-1), out=d)
    if temperature != 1.0:
        d.mul_(1.0 / temperature)
    torch.exp(d, out=e)
    torch.sum(e, dim=-1, out=stats.sum_T[block])
    if stats.energy_T is not None:
        d.mul_(e)
        torch.sum(d, dim=-1, out=stats.energy_T[block])


def shift_stats(stats: RowStats, max_T: Tensor, temperature: float) -> RowStats:
    """The same sums with respect to a larger maximum, in place."""
    # A shard of padding alone has maximum -inf and sums 0: the clamp keeps 0 * inf away.
    gap_T = ((stats.max_T - max_T) / temperature).clamp_min(-1e30)
    scale_T = gap_T.exp()
    if stats.energy_T is not None:
        stats.energy_T.add_(stats.sum_T * gap_T).mul_(scale_T)
    if stats.rest_T is not None:
        stats.rest_T.mul_(scale_T)
    stats.sum_T.mul_(scale_T)
    return RowStats(max_T, stats.sum_T, stats.energy_T, stats.rest_T)


@dataclass(frozen=True)
class SoftmaxTerm:
    """A row-wise term of the gradient: softmax(z / temperature) * (scale_T + slope_T * log softmax)."""

    lse_T: Tensor
    temperature: float
    scale_T: Tensor
    slope_T: Tensor | None = None


def write_dense(
    grad_TV: Tensor,
    logits_TV: Tensor,
    shard: Shard,
    terms: list[SoftmaxTerm],
    add: Callable[[slice, Tensor, Tensor], None] | None = None,
    at_least: int = 1,
) -> None:
    """grad := sum of the terms, padding columns 0. grad may be the storage of the logits.

    add(block, z, total): adds what is no multiple of a softmax to the total of a block of rows, in the compute dtype.
    at_least: rows of a block, for an `add` that is cheaper on many.
    """
    tokens, dtype = logits_TV.shape[0], compute_dtype(logits_TV)
    grad_TV[:, shard.valid :] = 0.0
    if not terms and add is None:
        grad_TV.zero_()
    if not (terms or add) or not shard.valid or not tokens:
        return
    blocks = list(row_blocks(tokens, shard.valid, logits_TV, at_least=at_least))
    direct = grad_TV.dtype == dtype and len(terms) == 1 and terms[0].slope_T is None and add is None
    scratch = None if direct else torch.empty((3, blocks[0].stop, shard.valid), dtype=dtype, device=logits_TV.device)
    for block in blocks:
        z, out = logits_TV[block, : shard.valid], grad_TV[block, : shard.valid]
        if scratch is None:
            _scaled_softmax(z, terms[0], block, out)
            continue
        total = _sum_of_terms(z, terms, block, scratch)
        if add is not None:
            add(block, z, total)
        out.copy_(total)


def _scaled_softmax(z: Tensor, term: SoftmaxTerm, block: slice, out: Tensor) -> None:
    if term.temperature != 1.0:
        z = torch.mul(z, 1.0 / term.temperature, out=out)
    torch.sub(z, term.lse_T[block].unsqueeze(-1), out=out)
    out.exp_().mul_(term.scale_T[block].unsqueeze(-1))


def _sum_of_terms(z: Tensor, terms: list[SoftmaxTerm], block: slice, scratch: Tensor) -> Tensor:
    total, lq, q = (s[: z.shape[0]] for s in scratch)
    if not terms:
        total.zero_()
    for i, term in enumerate(terms):
        lq.copy_(z).mul_(1.0 / term.temperature).sub_(term.lse_T[block].unsqueeze(-1))
        torch.exp(lq, out=q)
        if term.slope_T is None:
            q.mul_(term.scale_T[block].unsqueeze(-1))
        else:
            q.mul_(lq.mul_(term.slope_T[block].unsqueeze(-1)).add_(term.scale_T[block].unsqueeze(-1)))
        if i:
            total.add_(q)
        else:
            total.copy_(q)
    return total
