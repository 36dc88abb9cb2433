"""The pass for divergences that need the summand of every vocabulary entry: full targets, and clips outside a top-k.

It reads the logits twice, because ln M (the mixture) needs both normalisers before its sum can start:

    1. row statistics of student and teacher -> all-reduce MAX of [T + R] -> all-reduce SUM of O(T + R) numbers
    2. summands                              -> all-reduce SUM of O(R) numbers

The backward computes the derivatives of the summands again, block by block, from the saved normalisers: without
communication, and without any tensor of the logits' size except the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_hdpo.divergence.akl import full_akl_weights
from megatron_hdpo.divergence.entries import Entries, find_entries, rows_within
from megatron_hdpo.divergence.kinds import LOG_ZERO, DivergenceSpec, summands
from megatron_hdpo.divergence.options import Options, Outputs, Upstream, at_rows, gradient_storage, spread
from megatron_hdpo.divergence.row_stats import RowStats, SoftmaxTerm, local_stats, shift_stats, write_dense
from megatron_hdpo.divergence.shard import VocabShard, compute_dtype, row_blocks
from megatron_hdpo.divergence.teacher_rows import DenseRows, ScatteredTopK, TeacherLogits


@dataclass(frozen=True)
class _DenseNormalisers:
    """Statistics over the whole group: of the student for all tokens, of the teacher for the target rows."""

    lse_T: Tensor
    lse_distill_T: Tensor
    entropy_T: Tensor | None
    sampled_T: Tensor
    lse_teacher_R: Tensor | None
    best_R: Tensor


def _teacher_stats(teacher: TeacherLogits, shard: VocabShard, temperature: float, like: Tensor) -> RowStats:
    """Compute the row statistics of the teacher's shard, block by block."""
    dtype = compute_dtype(like)
    parts = [
        local_stats(teacher.block(block).to(dtype), shard, temperature, maxima=True)
        for block in row_blocks(len(teacher), shard.width, like, at_least=teacher.height)
    ]
    empty = torch.zeros(0, dtype=dtype, device=like.device)
    return RowStats(
        torch.cat([empty, *(p.ref_T for p in parts)]), torch.cat([empty, *(p.sum_T for p in parts)]), None, None
    )


def _normalisers(logits_TV: Tensor, sampled: Entries, teacher: TeacherLogits, options: Options) -> _DenseNormalisers:
    """Read student and teacher for the first time and join the ranks by two all-reduces."""
    shard, tokens = options.shard, logits_TV.shape[0]
    t_s, t_d = options.temperature, options.distill_temperature
    # Two temperatures share one maximum: a reference of 0 that suits the one may be far away for the other.
    student = local_stats(logits_TV, shard, t_s, entropy=options.entropy, maxima=t_s != t_d)
    other = student if t_s == t_d else local_stats(logits_TV, shard, t_d, maxima=True)
    taught = None if isinstance(teacher, ScatteredTopK) else _teacher_stats(teacher, shard, t_d, logits_TV)
    maxima = torch.cat([student.ref_T] if taught is None else [student.ref_T, taught.ref_T])
    max_T, max_R = shard.all_reduce_max_(maxima).tensor_split([tokens])
    student = shift_stats(student, max_T, t_s)
    other = student if t_s == t_d else shift_stats(other, max_T, t_d)
    sampled_T1 = sampled.gather(logits_TV, compute_dtype(logits_TV))
    local = {"sum": student.sum_T, "other": other.sum_T, "sampled": sampled_T1.squeeze(-1)}
    if student.energy_T is not None:
        local["energy"] = student.energy_T
    if taught is not None:
        local["teacher"] = shift_stats(taught, max_R, t_d).sum_T
    total = dict(zip(local, shard.all_reduce_sum(list(local.values())), strict=True))
    lse_teacher_R = None
    if isinstance(teacher, ScatteredTopK):
        best_R = teacher.logprobs_RK.amax(-1)
    else:
        lse_teacher_R = max_R / t_d + total["teacher"].log()
        best_R = max_R / t_d - lse_teacher_R
    entropy_T = total["sum"].log() - total["energy"] / total["sum"] if "energy" in total else None
    lse_T, lse_d_T = max_T / t_s + total["sum"].log(), max_T / t_d + total["other"].log()
    return _DenseNormalisers(
        lse_T=lse_T,
        lse_distill_T=lse_d_T,
        entropy_T=entropy_T,
        sampled_T=total["sampled"],
        lse_teacher_R=lse_teacher_R,
        best_R=best_R,
    )


@dataclass(frozen=True)
class _RowTerms:
    """Per target row: the divergence, the sum of r = q dt/dq over the vocabulary, AKL's weights [R, 1], diagnostics."""

    value_R: Tensor
    mean_R: Tensor
    weights: tuple[Tensor, Tensor] | None
    diagnostics: tuple[Tensor, Tensor, Tensor]


def _block_weights(weights: tuple[Tensor, Tensor] | None, block: slice) -> tuple[Tensor, Tensor] | None:
    return None if weights is None else (weights[0][block], weights[1][block])


def _sum_summands(logits_TV: Tensor, rows: DenseRows, spec: DivergenceSpec) -> _RowTerms:
    """Read the logits a second time, sum the summands and all-reduce them (AKL has more all-reduces before that)."""
    weights = full_akl_weights(logits_TV, rows, spec.beta) if spec.base == "akl" else None
    sums_R6 = rows.lse_R.new_zeros((len(rows.teacher), 6))
    for block in rows.blocks(logits_TV):
        lp, lq = rows.pair(logits_TV, block)
        p, q = lp.exp(), lq.exp()
        t, r = summands(spec, lp, lq, _block_weights(weights, block), (p, q))
        first = lp >= rows.best_R[block].unsqueeze(-1)
        columns = [t, r, q * (lp > 0.5 * LOG_ZERO), torch.minimum(p, q), q * first, first.to(q.dtype)]
        sums_R6[block] = torch.stack([c.sum(-1) for c in columns], dim=-1)
    sums_R6 = rows.shard.all_reduce_sum([sums_R6])[0]
    if isinstance(rows.teacher, ScatteredTopK):  # a row with an empty support has no divergence
        sums_R6 = sums_R6 * rows.teacher.live_R.unsqueeze(-1)
    value_R, mean_R, mass_R, covered_R, top_R, ties_R = sums_R6.unbind(-1)
    return _RowTerms(value_R, mean_R, weights, (mass_R, covered_R, top_R / ties_R.clamp_min(1.0)))


@dataclass(frozen=True)
class DensePass:
    """A finished pass with a target over the whole vocabulary; see options.Pass."""

    outputs: Outputs
    options: Options
    sampled: Entries
    stats: _DenseNormalisers
    rows: DenseRows
    terms: _RowTerms
    ids_T: Tensor

    @classmethod
    def run(cls, logits_TV: Tensor, ids_T: Tensor | None, teacher: TeacherLogits, options: Options) -> DensePass:
        """Run the forward pass. logits_TV: [T, V / tp]; ids_T: int64 [T] or None; teacher: a flat target."""
        if ids_T is None:
            ids_T = torch.full(logits_TV.shape[:1], -1, device=logits_TV.device)
        sampled = find_entries(ids_T.unsqueeze(-1), None, options.shard)
        stats = _normalisers(logits_TV, sampled, teacher, options)
        lse_R = at_rows(stats.lse_distill_T, teacher.rows)
        rows = DenseRows(
            teacher=teacher,
            shard=options.shard,
            temperature=options.distill_temperature,
            lse_R=lse_R,
            lse_teacher_R=stats.lse_teacher_R,
            best_R=stats.best_R,
        )
        terms = _sum_summands(logits_TV, rows, options.spec)
        logprobs_T = None
        if options.logprobs:
            logprobs_T = (stats.sampled_T / options.temperature - stats.lse_T).masked_fill(ids_T < 0, 0.0)
        entropy_T = None if stats.entropy_T is None else stats.entropy_T.detach()
        tokens = logits_TV.shape[0]
        mine = (spread(x, teacher.rows, tokens) for x in (terms.value_R, *terms.diagnostics))
        return cls(
            outputs=Outputs(logprobs_T, entropy_T, *mine),
            options=options,
            sampled=sampled,
            stats=stats,
            rows=rows,
            terms=terms,
            ids_T=ids_T,
        )

    def with_teacher(self, teacher: TeacherLogits) -> DensePass:
        """Return the same pass with another source of the same teacher logits for its gradient."""
        return replace(self, rows=replace(self.rows, teacher=teacher))

    def without_outputs(self) -> DensePass:
        """Return the pass without its outputs; see options.Pass."""
        return replace(self, outputs=Outputs.none())

    def gradient(self, logits_TV: Tensor, upstream: Upstream, *, inplace: bool) -> Tensor:
        """Compute the gradient to the logits; see options.Pass."""
        logprob_T = scale_T = slope_T = None
        if upstream.logprobs_T is not None:
            logprob_T = upstream.logprobs_T.masked_fill(self.ids_T < 0, 0.0) / self.options.temperature
            scale_T = -logprob_T
        if upstream.entropy_T is not None and self.stats.entropy_T is not None:
            slope_T = -upstream.entropy_T / self.options.temperature
            entropy_T = slope_T * self.stats.entropy_T
            scale_T = entropy_T if scale_T is None else scale_T + entropy_T
        terms = []
        if scale_T is not None:
            terms.append(SoftmaxTerm(self.stats.lse_T, self.options.temperature, scale_T, slope_T))
        grad_TV = gradient_storage(logits_TV, inplace)
        adder = _Adder(self, logprob_T, self._weight_of_rows(upstream))
        write_dense(grad_TV, logits_TV, self.options.shard, terms, add=adder, at_least=self.rows.teacher.height)
        return grad_TV

    def _weight_of_rows(self, upstream: Upstream) -> Tensor | None:
        if upstream.divergence_T is None:
            return None
        weight_R = at_rows(upstream.divergence_T, self.rows.teacher.rows) / self.options.distill_temperature
        if isinstance(self.rows.teacher, ScatteredTopK):
            weight_R = weight_R.masked_fill(~self.rows.teacher.live_R, 0.0)
        return weight_R


class _Adder:
    """Callable that adds to a block of the gradient what no softmax term covers: sampled token and divergence."""

    def __init__(self, made: DensePass, logprob_T: Tensor | None, weight_R: Tensor | None) -> None:
        self.made, self.logprob_T, self.weight_R = made, logprob_T, weight_R
        teacher = made.rows.teacher
        self.row_R = torch.arange(len(teacher), device=made.ids_T.device) if teacher.rows is None else teacher.rows
        self.known = teacher.rows if teacher.host_rows is None else teacher.host_rows

    def __call__(self, block: slice, z: Tensor, total: Tensor) -> None:
        if self.logprob_T is not None:
            self.made.sampled.within([block])[0].add(self.logprob_T, total)
        if self.weight_R is not None:
            self._add_divergence(block, z, total, self.weight_R)

    def _add_divergence(self, block: slice, z: Tensor, total: Tensor, weight_R: Tensor) -> None:
        (mine,) = rows_within(self.known, [block])
        if mine.start == mine.stop:
            return
        rows, terms = self.made.rows, self.made.terms
        where = self.row_R[mine] - block.start
        lp, lq = rows.teacher_logprobs(mine), rows.student_logprobs(z[where], mine)
        p, q = lp.exp(), lq.exp()
        _, r = summands(self.made.options.spec, lp, lq, _block_weights(terms.weights, mine), (p, q))
        r -= q.mul_(terms.mean_R[mine].unsqueeze(-1))
        total.index_add_(0, where, r.mul_(weight_R[mine].unsqueeze(-1)))
