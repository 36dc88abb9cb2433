"""The weights of AKL over a sharded vocabulary, without sorting it or moving it between ranks (arXiv 2404.02657).

The head is the teacher's most likely tokens whose cumulative mass stays within mu; it always contains the most likely
token, and tokens of equal probability are either all in it or all outside. The threshold is found by a radix search
over the bits of the probabilities, eight bits per round from the top: each round sums the mass of every value of the
next eight bits, over the tokens whose higher bits match the prefix found so far, and picks the value at which the
cumulative mass passes mu. Tokens with the last such value belong to the tail, unless they are the most likely ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_hdpo.divergence.teacher_rows import DenseRows


def full_akl_weights(logits_TV: Tensor, rows: DenseRows, mu: float) -> tuple[Tensor, Tensor]:
    """Compute the weights [R, 1] of forward and reverse KL: the head's and the tail's share of sum |p - q|.

    logits_TV: [T, V / tp]. mu: the mass of the head, in [0, 1]. Collective over the shard's group: five all-reduces
    (nine in float64), four of them (eight) of 256 numbers per row.
    """
    least_R, everything_R = _head_key(logits_TV, rows, mu)
    gaps_R2 = rows.lse_R.new_zeros((len(rows.teacher), 2))
    for block in rows.blocks(logits_TV):
        lp, lq = rows.pair(logits_TV, block)
        p = lp.exp()
        gap = (p - lq.exp()).abs()
        head = (_keys(p) >= least_R[block].unsqueeze(-1)) | everything_R[block].unsqueeze(-1)
        gaps_R2[block] = torch.stack([(gap * head).sum(-1), gap.sum(-1)], dim=-1)
    head_R1, all_R1 = rows.shard.all_reduce_sum([gaps_R2])[0].split(1, dim=-1)
    forward_R1 = head_R1 / all_R1.clamp_min(torch.finfo(all_R1.dtype).tiny)
    return forward_R1, 1.0 - forward_R1


def _keys(p: Tensor) -> Tensor:
    """Return the bits of non-negative floats as int64; they sort in the same order as the floats."""
    return p.view(torch.int64 if p.dtype == torch.float64 else torch.int32).to(torch.int64)


def _head_key(logits_TV: Tensor, rows: DenseRows, mu: float) -> tuple[Tensor, Tensor]:
    """Return the smallest key in each row's head, [R], and which rows have the whole vocabulary as head, [R]."""
    count, dtype = len(rows.teacher), rows.lse_R.dtype
    prefix_R = torch.zeros(count, dtype=torch.int64, device=rows.lse_R.device)
    above_R = torch.zeros(count, dtype=dtype, device=rows.lse_R.device)
    everything_R = torch.zeros(count, dtype=torch.bool, device=rows.lse_R.device)
    bits = 8 * dtype.itemsize
    for shift in range(bits - 8, -8, -8):
        mass = rows.shard.all_reduce_sum([_digit_mass(logits_TV, rows, prefix_R, shift)])[0]
        down = mass.flip(-1).cumsum(-1)  # mass of the largest digits first
        passed = above_R.unsqueeze(-1) + down > mu
        if shift == bits - 8:
            everything_R = ~passed.any(-1) | (mu >= 1.0)  # rounding may take a sum of probabilities above 1
        first_R = passed.to(torch.int8).argmax(-1)
        before = torch.cat([torch.zeros_like(down[:, :1]), down[:, :-1]], dim=-1)
        above_R = above_R + before.gather(-1, first_R.unsqueeze(-1)).squeeze(-1)
        prefix_R = prefix_R * 256 + (255 - first_R)
    return torch.where(above_R > 0, prefix_R + 1, prefix_R), everything_R


def _digit_mass(logits_TV: Tensor, rows: DenseRows, prefix_R: Tensor, shift: int) -> Tensor:
    """Sum the teacher's mass by the eight bits at `shift`, [R, 256], over tokens whose higher bits are the prefix."""
    out = rows.lse_R.new_zeros((len(rows.teacher), 256))
    for block in rows.blocks(logits_TV):
        p = rows.teacher_logprobs(block).exp()
        key = _keys(p) >> shift
        out[block].scatter_add_(1, key & 255, p * ((key >> 8) == prefix_R[block].unsqueeze(-1)))
    return out
