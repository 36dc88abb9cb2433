"""AKL's head and tail over a sharded vocabulary, without sorting it or moving it between ranks.

The head is the teacher's most likely tokens whose cumulative mass stays within mu, the first always; tokens of one
probability stay together. It is found by the bits of the probabilities, eight at a time from the top: each round sums
the mass of every value of the next eight bits, over the tokens that agree so far, and picks the value in which the
cumulative mass passes mu. The tokens of the last such value are tail, unless they are the first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_hdpo.divergence.rows import DenseRows


def full_akl_weights(logits_TV: Tensor, rows: DenseRows, mu: float) -> tuple[Tensor, Tensor]:
    """Weights [R, 1] of forward and reverse KL: the head's and the tail's share of sum |p - q|.

    Five all-reduces (nine in float64), four of them of 256 numbers per row.
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
    """The bits of non-negative floats, which sort as the floats do."""
    return p.view(torch.int64 if p.dtype == torch.float64 else torch.int32).to(torch.int64)


def _head_key(logits_TV: Tensor, rows: DenseRows, mu: float) -> tuple[Tensor, Tensor]:
    """The least key of the head, [R], and rows whose whole vocabulary is head, [R]."""
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
            everything_R = ~passed.any(-1) | (mu >= 1.0)  # a sum to 1 may round to more
        place_R = passed.to(torch.int8).argmax(-1)
        before = torch.cat([torch.zeros_like(down[:, :1]), down[:, :-1]], dim=-1)
        above_R = above_R + before.gather(-1, place_R.unsqueeze(-1)).squeeze(-1)
        prefix_R = prefix_R * 256 + (255 - place_R)
    return torch.where(above_R > 0, prefix_R + 1, prefix_R), everything_R


def _digit_mass(logits_TV: Tensor, rows: DenseRows, prefix_R: Tensor, shift: int) -> Tensor:
    """[R, 256]: teacher's mass by the eight bits at `shift`, of the tokens whose higher bits are the prefix."""
    out = rows.lse_R.new_zeros((len(rows.teacher), 256))
    for block in rows.blocks(logits_TV):
        p = rows.teacher_logprobs(block).exp()
        key = _keys(p) >> shift
        out[block].scatter_add_(1, key & 255, p * ((key >> 8) == prefix_R[block].unsqueeze(-1)))
    return out
