"""Row statistics of the logits in one read, and the dense part of the gradient in one read and one write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hdpo.divergence.shard import OwnedEntries, VocabShard, compute_dtype, row_blocks


@dataclass(frozen=True)
class RowStats:
    """Row statistics of one rank's shard, with e = exp((z - max_T) / temperature).

    max_T: the largest logit. sum_T: sum of e. energy_T: sum of e * (z - max_T) / temperature, for the entropy.
    rest_T: sum of e outside the support.
    """

    max_T: Tensor
    sum_T: Tensor
    energy_T: Tensor | None
    rest_T: Tensor | None


def local_stats(
    logits_TV: Tensor,
    shard: VocabShard,
    temperature: float,
    *,
    entropy: bool = False,
    holes: OwnedEntries | None = None,
) -> RowStats:
    """Compute the row statistics of a shard [T, V / tp].

    entropy: also energy_T. holes: the entries of the support; with them also rest_T, which leaves them out.
    """
    tokens, dtype, device = logits_TV.shape[0], compute_dtype(logits_TV), logits_TV.device
    max_T = torch.full((tokens,), -torch.inf, dtype=dtype, device=device)
    sum_T = torch.zeros(tokens, dtype=dtype, device=device)
    energy_T = torch.zeros_like(sum_T) if entropy else None
    rest_T = torch.zeros_like(sum_T) if holes is not None else None
    stats = RowStats(max_T, sum_T, energy_T, rest_T)
    if not shard.valid or not tokens:
        return stats
    blocks = list(row_blocks(tokens, shard.valid, logits_TV))
    spare = entropy or temperature != 1.0 or logits_TV.dtype != dtype
    scratch = torch.empty((2 if spare else 1, blocks[0].stop, shard.valid), dtype=dtype, device=device)
    parts = holes.within(blocks) if holes is not None else [slice(0, 0)] * len(blocks)
    for block, part in zip(blocks, parts, strict=True):
        rows = block.stop - block.start
        e, top_C = _block_stats(logits_TV[block, : shard.valid], stats, block, temperature, scratch[:, :rows])
        if holes is not None and rest_T is not None:
            e[holes.row[part] - block.start, holes.col[part]] = 0.0
            torch.div(e.sum(dim=-1), top_C, out=rest_T[block]).masked_fill_(max_T[block] == -torch.inf, 0.0)
    return stats


def _block_stats(
    z: Tensor, stats: RowStats, block: slice, temperature: float, scratch: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the statistics of one block of rows; return its softmax over the shard and the row maxima of that [n].

    Both are NaN in a row that is -inf on the whole shard.
    """
    e, spare = scratch[0], scratch[-1]
    torch.amax(z, dim=-1, out=stats.max_T[block]) if z.dtype == e.dtype else stats.max_T[block].copy_(z.amax(dim=-1))
    z = local_softmax(z, temperature, e, spare)
    top_C = e.amax(dim=-1)
    # A row that is -inf on the whole shard (a masked teacher) has a softmax of NaN here, and no mass. To ask whether
    # there is one would make the host wait.
    dead_C = stats.max_T[block] == -torch.inf
    torch.div(e.sum(dim=-1), top_C, out=stats.sum_T[block]).masked_fill_(dead_C, 0.0)
    if stats.energy_T is not None:
        torch.sub(z, stats.max_T[block].unsqueeze(-1) / temperature, out=spare).mul_(e)
        torch.div(spare.sum(dim=-1), top_C, out=stats.energy_T[block]).masked_fill_(dead_C, 0.0)
    return e, top_C


def local_softmax(z: Tensor, temperature: float, out: Tensor, spare: Tensor) -> Tensor:
    """Write softmax(z / temperature) over this shard's columns to `out`; return z / temperature in the dtype of out.

    torch's softmax reads and writes once and costs half of torch.exp, but its sum drifts on long rows (by 1e-5 at
    150,000 columns in float32). So callers must not rely on its scale: they correct it by its largest entry, which
    should be exp(max - lse).
    """
    if z.dtype != out.dtype:
        z = spare.copy_(z)
    if temperature != 1.0:
        z = torch.mul(z, 1.0 / temperature, out=spare)
    torch.softmax(z, dim=-1, out=out)
    return z


def shift_stats(stats: RowStats, max_T: Tensor, temperature: float) -> RowStats:
    """Change the sums, in place, to refer to the larger maximum `max_T` (that of the group)."""
    # A shard that holds only padding has maximum -inf and sums 0: the clamp avoids 0 * inf.
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
    """A term of the gradient, row by row: q (scale_T + slope_T ln q) with q = softmax(z / temperature) over all ranks.

    max_T: the largest logit of each row in this rank's shard; lse_T: the log-normaliser over all ranks.
    """

    max_T: Tensor
    lse_T: Tensor
    temperature: float
    scale_T: Tensor
    slope_T: Tensor | None = None

    def correction(self, local_C1: Tensor, block: slice) -> Tensor:
        """Return the factors [n, 1] from a softmax over this shard, with row maxima local_C1, to q."""
        return (self.max_T[block] / self.temperature - self.lse_T[block]).exp().unsqueeze(-1) / local_C1


def write_dense(
    grad_TV: Tensor,
    logits_TV: Tensor,
    shard: VocabShard,
    terms: list[SoftmaxTerm],
    add: Callable[[slice, Tensor, Tensor], None] | None = None,
    at_least: int = 1,
) -> None:
    """Write the sum of the terms to grad [T, V / tp], 0 in padding columns; grad may be the storage of the logits.

    add(block, z, total): adds whatever is not a softmax term to the total of a block of rows, in the compute dtype.
    at_least: smallest number of rows of a block, for an `add` that is cheaper on many.
    """
    tokens, dtype = logits_TV.shape[0], compute_dtype(logits_TV)
    grad_TV[:, shard.valid :] = 0.0
    if not terms and add is None:
        grad_TV.zero_()
    if not (terms or add) or not shard.valid or not tokens:
        return
    blocks = list(row_blocks(tokens, shard.valid, logits_TV, at_least=at_least))
    direct = len(terms) == 1 and terms[0].slope_T is None and add is None
    plain = direct and grad_TV.dtype == dtype and terms[0].temperature == 1.0
    count = 1 if plain else 2 if direct else 3
    scratch = torch.empty((count, blocks[0].stop, shard.valid), dtype=dtype, device=logits_TV.device)
    for block in blocks:
        z, out = logits_TV[block, : shard.valid], grad_TV[block, : shard.valid]
        if direct:
            _write_softmax(z, terms[0], block, out, scratch[:, : z.shape[0]])
            continue
        total = _sum_of_terms(z, terms, block, scratch[:, : z.shape[0]])
        if add is not None:
            add(block, z, total)
        out.copy_(total)


def _write_softmax(z: Tensor, term: SoftmaxTerm, block: slice, out: Tensor, scratch: Tensor) -> None:
    """Write q scale to `out`."""
    q = scratch[0]
    local_softmax(z, term.temperature, q, scratch[-1])
    factor_C1 = term.correction(q.amax(dim=-1, keepdim=True), block).mul_(term.scale_T[block].unsqueeze(-1))
    if out.dtype == q.dtype:
        torch.mul(q, factor_C1, out=out)
    else:
        out.copy_(q.mul_(factor_C1))


def _sum_of_terms(z: Tensor, terms: list[SoftmaxTerm], block: slice, scratch: Tensor) -> Tensor:
    """Sum the terms for a block of rows, in the first scratch tensor."""
    total, lq, q = scratch
    if not terms:
        total.zero_()
    for i, term in enumerate(terms):
        out = q if i else total
        z_t = local_softmax(z, term.temperature, out, lq)
        factor_C1 = term.correction(out.amax(dim=-1, keepdim=True), block)
        scale_C1 = term.scale_T[block].unsqueeze(-1)
        if term.slope_T is None:
            out.mul_(factor_C1 * scale_C1)
        else:
            torch.sub(z_t, term.lse_T[block].unsqueeze(-1), out=lq)
            lq.mul_(term.slope_T[block].unsqueeze(-1)).add_(scale_C1)
            out.mul_(lq).mul_(factor_C1)
        if i:
            total.add_(q)
    return total
