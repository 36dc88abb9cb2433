"""Row statistics of the logits in one read, and the dense part of the gradient in one read and one write.

On a CPU every operation on a block costs as much as another one, so a pass has as few as it can: where a row's sum of
exp(z / temperature) is neither tiny nor huge, no maximum is looked for and none is subtracted.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_hdpo.divergence.entries import Entries
from megatron_hdpo.divergence.shard import VocabShard, compute_dtype, row_blocks

# Between these bounds a sum of exponentials is as precise as one relative to the largest, and so is its gradient.
_LEAST, _MOST = 2.0**-10, 2.0**60


@dataclass(frozen=True)
class RowStats:
    """Row statistics of one rank's shard, with e = exp((z - ref_T) / temperature).

    ref_T: the largest logit, or 0. sum_T: sum of e. energy_T: sum of e * (z - ref_T) / temperature, for the entropy.
    rest_T: sum of e outside the support.
    """

    ref_T: Tensor
    sum_T: Tensor
    energy_T: Tensor | None
    rest_T: Tensor | None


@dataclass(frozen=True)
class _Powers:
    """Exponentials base^(z rate) = exp(z / temperature), in the base whose function is faster; ln_base is its log."""

    function: Callable[..., Tensor]
    ln_base: float
    rate: float

    @classmethod
    def of(cls, temperature: float, like: Tensor) -> _Powers:
        """Choose the base; the rate is rounded to the dtype of `like`."""
        function, ln_base = (torch.exp, 1.0) if like.is_cuda or _mkl_is_fast() else (torch.exp2, math.log(2.0))
        rate = torch.tensor(1.0 / (temperature * ln_base), dtype=like.dtype).item()
        return cls(function, ln_base, rate)

    def exponents(self, z: Tensor, minus_ref_C: Tensor | None, out: Tensor) -> Tensor:
        """Return z rate - ref [n, valid] in the dtype of out, written to `out` unless it is z itself.

        minus_ref_C: [n]; None for 0. A fused multiply-add rounds once: ref is exact, whatever it was rounded from.
        """
        if z.dtype != out.dtype:
            z = out.copy_(z)
        if minus_ref_C is not None:
            return torch.add(minus_ref_C.unsqueeze(-1), z, alpha=self.rate, out=out)
        return z if self.rate == 1.0 else torch.mul(z, self.rate, out=out)

    def __call__(self, exponents: Tensor, out: Tensor) -> Tensor:
        """Write base^exponents to `out` and return it."""
        return self.function(exponents, out=out)


@functools.cache
def _mkl_is_fast() -> bool:
    """Return whether torch.exp, which calls MKL, is faster than torch.exp2, which is torch's own on every processor.

    On Intel's it takes 0.7 of the time of exp2. On an AMD EPYC it was measured at twice a whole torch.softmax.
    """
    info = Path("/proc/cpuinfo")
    return torch.backends.mkl.is_available() and info.exists() and "GenuineIntel" in info.read_text()


def local_stats(
    logits_TV: Tensor,
    shard: VocabShard,
    temperature: float,
    *,
    entropy: bool = False,
    maxima: bool = False,
    holes: Entries | None = None,
) -> RowStats:
    """Compute the row statistics of a shard [T, V / tp].

    entropy: also energy_T. maxima: ref_T must be the largest logit. holes: the entries of the support; with them also
    rest_T, which leaves them out.
    """
    tokens, dtype, device = logits_TV.shape[0], compute_dtype(logits_TV), logits_TV.device
    ref_T = torch.full((tokens,), -torch.inf, dtype=dtype, device=device)
    sum_T = torch.zeros(tokens, dtype=dtype, device=device)
    energy_T = torch.zeros_like(sum_T) if entropy else None
    rest_T = torch.zeros_like(sum_T) if holes is not None else None
    stats = RowStats(ref_T, sum_T, energy_T, rest_T)
    if not shard.valid or not tokens:
        return stats
    blocks = list(row_blocks(tokens, shard.valid, logits_TV))
    scratch = torch.empty((2 if entropy else 1, blocks[0].stop, shard.valid), dtype=dtype, device=device)
    parts = holes.within(blocks) if holes is not None else [None] * len(blocks)
    powers, minus_ref_T = _Powers.of(temperature, sum_T), torch.zeros_like(sum_T)
    plain = device.type == "cpu" and not entropy and not maxima  # elsewhere the look at the sums would stall the device
    for block, part in zip(blocks, parts, strict=True):
        z, work = logits_TV[block, : shard.valid], scratch[:, : block.stop - block.start]
        plain = plain and _plain_sums(z, powers, ref_T[block], sum_T[block], work[0])
        e = work[0] if plain else _sums_below_maxima(z, powers, stats, block, minus_ref_T[block], work)
        if part is not None and rest_T is not None:
            part.clear(e)
            torch.sum(e, dim=-1, out=rest_T[block])
    _refer_exactly(stats, minus_ref_T, powers)
    return stats


def _plain_sums(z: Tensor, powers: _Powers, ref_C: Tensor, sum_C: Tensor, e: Tensor) -> bool:
    """Sum exp(z / temperature), left in `e`, relative to 0; return whether every row's sum is within the bounds."""
    torch.sum(powers(powers.exponents(z, None, e), out=e), dim=-1, out=sum_C)
    ref_C.zero_()
    return bool(((sum_C > _LEAST) & (sum_C < _MOST)).all())


def _sums_below_maxima(
    z: Tensor, powers: _Powers, stats: RowStats, block: slice, minus_ref_C: Tensor, work: Tensor
) -> Tensor:
    """Compute the statistics of a block of rows relative to base^ref, with ref next to the row's maximum; return e."""
    ref_C = stats.ref_T[block]
    ref_C.copy_(z.amax(dim=-1))
    x = powers.exponents(z, torch.mul(ref_C, -powers.rate, out=minus_ref_C), work[0])
    e = powers(x, out=work[-1])
    torch.sum(e, dim=-1, out=stats.sum_T[block])
    if stats.energy_T is not None:
        torch.sum(x.mul_(e), dim=-1, out=stats.energy_T[block])
    return e


def _refer_exactly(stats: RowStats, minus_ref_T: Tensor, powers: _Powers) -> None:
    """Let sums and energy refer to ref_T itself instead of its rounded multiple, and the energy to e, in place.

    A row that is -inf on the whole shard (a masked teacher) has NaN here, and no mass.
    """
    lack_T = -(minus_ref_T.double() + stats.ref_T.double() * powers.rate).to(minus_ref_T.dtype)
    factor_T, dead_T = (lack_T * powers.ln_base).exp(), stats.ref_T == -torch.inf
    if stats.energy_T is not None:
        stats.energy_T.addcmul_(lack_T, stats.sum_T).mul_(factor_T * powers.ln_base).masked_fill_(dead_T, 0.0)
    for sum_T in (stats.sum_T, stats.rest_T):
        if sum_T is not None:
            sum_T.mul_(factor_T).masked_fill_(dead_T, 0.0)


def shift_stats(stats: RowStats, ref_T: Tensor, temperature: float) -> RowStats:
    """Change the sums, in place, to refer to the larger number `ref_T` (the group's largest)."""
    # A shard that holds only padding has reference -inf and sums 0: the clamp avoids 0 * inf.
    gap_T = ((stats.ref_T - ref_T) / temperature).clamp_min(-1e30)
    scale_T = gap_T.exp()
    if stats.energy_T is not None:
        stats.energy_T.add_(stats.sum_T * gap_T).mul_(scale_T)
    if stats.rest_T is not None:
        stats.rest_T.mul_(scale_T)
    stats.sum_T.mul_(scale_T)
    return RowStats(ref_T, stats.sum_T, stats.energy_T, stats.rest_T)


@dataclass(frozen=True)
class SoftmaxTerm:
    """A term of the gradient, row by row: q (scale_T + slope_T ln q) with q = softmax(z / temperature) over all ranks.

    lse_T: the log-normaliser over all ranks.
    """

    lse_T: Tensor
    temperature: float
    scale_T: Tensor
    slope_T: Tensor | None = None


@dataclass(frozen=True)
class _PowerTerm:
    """A term as base^x (constant_T1 + slope_T1 x) with x = z rate + minus_ref_T; None stands for 0."""

    powers: _Powers
    minus_ref_T: Tensor | None
    constant_T1: Tensor
    slope_T1: Tensor | None

    @classmethod
    def of(cls, term: SoftmaxTerm) -> _PowerTerm:
        """Convert a term. Where no ref is needed its factor is the normaliser; else q = base^(x + lack)."""
        powers, dtype = _Powers.of(term.temperature, term.lse_T), term.lse_T.dtype
        if term.slope_T is None and term.lse_T.device.type == "cpu":
            within = (term.lse_T > math.log(_LEAST)) & (term.lse_T < math.log(_MOST))
            if bool(within.all()):
                constant_T = (-term.lse_T.double()).exp() * term.scale_T
                return cls(powers, None, constant_T.to(dtype).unsqueeze(-1), None)
        exact_T = term.lse_T.double() * term.temperature * powers.rate
        minus_ref_T = -exact_T.to(dtype)
        lack_T = powers.ln_base * -(minus_ref_T.double() + exact_T).to(dtype)
        factor_T = lack_T.exp()
        if term.slope_T is None:
            return cls(powers, minus_ref_T, (factor_T * term.scale_T).unsqueeze(-1), None)
        constant_T = factor_T * (term.scale_T + term.slope_T * lack_T)
        slope_T = factor_T * term.slope_T * powers.ln_base
        return cls(powers, minus_ref_T, constant_T.unsqueeze(-1), slope_T.unsqueeze(-1))

    def exponents(self, z: Tensor, block: slice, out: Tensor) -> Tensor:
        """Return x of a block of rows; see _Powers.exponents."""
        return self.powers.exponents(z, None if self.minus_ref_T is None else self.minus_ref_T[block], out)


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
    scratch = torch.empty((1 if direct else 3, blocks[0].stop, shard.valid), dtype=dtype, device=logits_TV.device)
    parts = [_PowerTerm.of(term) for term in terms]
    for block in blocks:
        z, out = logits_TV[block, : shard.valid], grad_TV[block, : shard.valid]
        if direct:
            _write_softmax(z, parts[0], block, out, scratch[0, : z.shape[0]])
            continue
        total = _sum_of_terms(z, parts, block, scratch[:, : z.shape[0]])
        if add is not None:
            add(block, z, total)
        out.copy_(total)


def _write_softmax(z: Tensor, term: _PowerTerm, block: slice, out: Tensor, q: Tensor) -> None:
    """Write q scale to `out`."""
    term.powers(term.exponents(z, block, q), out=q)
    if out.dtype == q.dtype:
        torch.mul(q, term.constant_T1[block], out=out)
    else:
        out.copy_(q.mul_(term.constant_T1[block]))


def _sum_of_terms(z: Tensor, terms: list[_PowerTerm], block: slice, scratch: Tensor) -> Tensor:
    """Sum the terms for a block of rows, in the first scratch tensor."""
    total, x, q = scratch
    if not terms:
        total.zero_()
    for i, term in enumerate(terms):
        exponents = term.exponents(z, block, x)
        out = term.powers(exponents, out=q if i else total)
        if term.slope_T1 is None:
            out.mul_(term.constant_T1[block])
        else:
            out.mul_(exponents.mul_(term.slope_T1[block]).add_(term.constant_T1[block]))
        if i:
            total.add_(q)
    return total
