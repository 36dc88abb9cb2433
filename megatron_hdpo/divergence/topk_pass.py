"""The pass that computes log-prob, entropy and divergence to a top-k target from one read of the logits.

    forward:  read the logits once -> all-reduce MAX of [T] -> all-reduce SUM of O(T + R k) numbers -> O(R k) arithmetic
    backward: no communication; read the logits once, write the gradient once

With q = softmax(z / t_s) at the sampling temperature and w = softmax(z / t_d) at the distillation's, the gradient is

    g_u = (1/t_s) [ gl (1[u = y] - q_u) - gh q_u (ln q_u + H) ] + (1/t_d) gd (G_u on the support, w_u a elsewhere),

which is, in each row, a multiple of a softmax (of two, if the temperatures differ) except at the sampled token and at
the k ids of the support, where other values overwrite it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_hdpo.divergence.entries import Entries, find_entries
from megatron_hdpo.divergence.options import Options, Outputs, Upstream, at_rows, gradient_storage, spread
from megatron_hdpo.divergence.row_stats import SoftmaxTerm, local_stats, shift_stats, write_dense
from megatron_hdpo.divergence.shard import compute_dtype, row_blocks
from megatron_hdpo.divergence.targets import TopK
from megatron_hdpo.divergence.topk_terms import SupportTerms, support_terms


@dataclass(frozen=True)
class _TopKNormalisers:
    """Statistics over the whole group: log-normalisers at both temperatures, and the logits at the entries.

    rest_R: the student's mass outside the support; None unless the tail needs it.
    """

    lse_T: Tensor
    lse_distill_T: Tensor
    entropy_T: Tensor | None
    sampled_T: Tensor
    support_RK: Tensor | None
    rest_R: Tensor | None


@dataclass(frozen=True)
class _Entries:
    """The entries of the logits that a pass reads in addition to the row statistics."""

    sampled: Entries
    support: Entries | None
    target: TopK | None


def _find_entries(ids_T: Tensor, target: TopK | None, options: Options) -> _Entries:
    shard = options.shard
    sampled = find_entries(ids_T.unsqueeze(-1), None, shard)
    support = None if target is None else find_entries(target.ids_TK, target.rows, shard, target.host_rows)
    return _Entries(sampled, support, target)


def _normalisers(logits_TV: Tensor, entries: _Entries, options: Options) -> _TopKNormalisers:
    """Read the shard and join the ranks, always by two all-reduces."""
    local, max_T = _local_sums(logits_TV, entries, options)
    total = dict(zip(local, options.shard.all_reduce_sum(list(local.values())), strict=True))
    sum_T, other_T = total["sum"], total.get("other", total["sum"])
    rows = None if entries.target is None else entries.target.rows
    return _TopKNormalisers(
        lse_T=max_T / options.temperature + sum_T.log(),
        lse_distill_T=max_T / options.distill_temperature + other_T.log(),
        entropy_T=sum_T.log() - total["energy"] / sum_T if "energy" in total else None,
        sampled_T=total["sampled"],
        support_RK=total.get("support"),
        rest_R=total["rest"] / at_rows(other_T, rows) if "rest" in total else None,
    )


def _local_sums(logits_TV: Tensor, entries: _Entries, options: Options) -> tuple[dict[str, Tensor], Tensor]:
    """Return this rank's summands of everything that is summed over ranks, and the group's maxima."""
    shard, dtype, target = options.shard, compute_dtype(logits_TV), entries.target
    t_s, t_d = options.temperature, options.distill_temperature
    holes = entries.support if options.spec.tail == "bucket" else None
    two = target is not None and t_s != t_d
    # Two temperatures share one maximum: a reference of 0 that suits the one may be far away for the other.
    stats = local_stats(logits_TV, shard, t_s, entropy=options.entropy, maxima=two, holes=None if two else holes)
    other = local_stats(logits_TV, shard, t_d, maxima=True, holes=holes) if two else stats
    max_T = shard.all_reduce_max_(stats.ref_T.clone())
    stats = shift_stats(stats, max_T, t_s)
    other = shift_stats(other, max_T, t_d) if two else stats
    sampled_T1 = entries.sampled.gather(logits_TV, dtype)
    local = {"sum": stats.sum_T, "sampled": sampled_T1.squeeze(-1)}
    if stats.energy_T is not None:
        local["energy"] = stats.energy_T
    if target is not None and entries.support is not None:
        local["support"] = entries.support.gather(logits_TV, dtype)
        if other.rest_T is not None:
            local["rest"] = at_rows(other.rest_T, target.rows)
    if two:
        local["other"] = other.sum_T
    return local, max_T


@dataclass(frozen=True)
class TopKPass:
    """A finished pass with or without a top-k target; see options.Pass."""

    outputs: Outputs
    options: Options
    entries: _Entries
    stats: _TopKNormalisers
    terms: SupportTerms | None
    ids_T: Tensor
    logprobs_T: Tensor

    @classmethod
    def run(cls, logits_TV: Tensor, ids_T: Tensor | None, target: TopK | None, options: Options) -> TopKPass:
        """Run the forward pass. logits_TV: [T, V / tp]; ids_T: int64 [T] or None; target: flat (TopK.flat)."""
        if ids_T is None:
            ids_T = torch.full(logits_TV.shape[:1], -1, device=logits_TV.device)
        if target is not None:
            target = target.pruned()
        entries = _find_entries(ids_T, target, options)
        stats = _normalisers(logits_TV, entries, options)
        logprobs_T = (stats.sampled_T / options.temperature - stats.lse_T).masked_fill(ids_T < 0, 0.0)
        terms = None if target is None else _target_terms(stats, target, options)
        outputs = _outputs(options, stats, logprobs_T, terms, target)
        return cls(
            outputs=outputs,
            options=options,
            entries=entries,
            stats=stats,
            terms=terms,
            ids_T=ids_T,
            logprobs_T=logprobs_T.detach(),
        )

    def without_outputs(self) -> TopKPass:
        """Return the pass without its outputs; see options.Pass."""
        return replace(self, outputs=Outputs.none())

    def gradient(self, logits_TV: Tensor, upstream: Upstream, *, inplace: bool) -> Tensor:
        """Compute the gradient to the logits; see options.Pass."""
        scales = _Scales.of(self, upstream)
        grad_TV = gradient_storage(logits_TV, inplace)
        write_dense(grad_TV, logits_TV, self.options.shard, scales.softmax_terms(self))
        # The sampled token first: if the support contains it, the support's value includes it and must win.
        if scales.logprob_T is not None:
            self.entries.sampled.write(scales.at_sampled(self).unsqueeze(-1), grad_TV)
        if scales.divergence_R is not None and self.entries.support is not None:
            self.entries.support.write(scales.at_support(self), grad_TV)
        return grad_TV


def _target_terms(stats: _TopKNormalisers, target: TopK, options: Options) -> SupportTerms:
    support_RK, lse_R = stats.support_RK, at_rows(stats.lse_distill_T, target.rows)
    assert support_RK is not None
    # Block by block: the arithmetic has some ten temporaries, which are large for a target of 256 entries.
    count, k = support_RK.shape
    parts = []
    for block in row_blocks(count, 8 * k, support_RK) if count else [slice(0, 0)]:
        lq_RK = support_RK[block] / options.distill_temperature - lse_R[block].unsqueeze(-1)
        terms = support_terms(
            options.spec,
            lp_RK=target.logprobs_TK[block].to(lq_RK.dtype),
            lq_RK=lq_RK,
            used_RK=target.ids_TK[block] >= 0,
            rest_R=None if stats.rest_R is None else stats.rest_R[block],
            vocab_size=options.shard.vocab_size,
        )
        parts.append(terms)
    return SupportTerms.joined(parts)


def _outputs(
    options: Options, stats: _TopKNormalisers, logprobs_T: Tensor, terms: SupportTerms | None, target: TopK | None
) -> Outputs:
    shown_T = logprobs_T if options.logprobs else None
    # Detach: outputs join the autograd graph, the tensors saved for backward must not.
    entropy_T = None if stats.entropy_T is None else stats.entropy_T.detach()
    if terms is None or target is None:
        return Outputs(shown_T, entropy_T, None)
    mine = terms.value_R, terms.mass_R, terms.covered_R, terms.top_R
    return Outputs(shown_T, entropy_T, *(spread(x, target.rows, logprobs_T.shape[0]) for x in mine))


@dataclass(frozen=True)
class _Scales:
    """Upstream gradients as factors of each row, the 1 / temperature included.

    The dense part at the sampling temperature is q (scale_T + slope_T ln q); away_T is the factor of w outside the
    support.
    """

    logprob_T: Tensor | None
    divergence_R: Tensor | None
    scale_T: Tensor | None
    slope_T: Tensor | None
    away_T: Tensor | None

    @classmethod
    def of(cls, made: TopKPass, upstream: Upstream) -> _Scales:
        """Compute the factors of a pass from its upstream gradients."""
        options, target = made.options, made.entries.target
        logprob_T = scale_T = slope_T = divergence_R = away_T = None
        if upstream.logprobs_T is not None:
            logprob_T = upstream.logprobs_T.masked_fill(made.ids_T < 0, 0.0) / options.temperature
            scale_T = -logprob_T
        if upstream.entropy_T is not None and made.stats.entropy_T is not None:
            slope_T = -upstream.entropy_T / options.temperature
            from_entropy_T = slope_T * made.stats.entropy_T
            scale_T = from_entropy_T if scale_T is None else scale_T + from_entropy_T
        if upstream.divergence_T is not None and target is not None and made.terms is not None:
            divergence_R = at_rows(upstream.divergence_T, target.rows) / options.distill_temperature
            away_T = spread(divergence_R * made.terms.outside_R, target.rows, made.ids_T.shape[0])
        return cls(logprob_T, divergence_R, scale_T, slope_T, away_T)

    def softmax_terms(self, made: TopKPass) -> list[SoftmaxTerm]:
        """Return the dense part of the gradient: one softmax term, or two if the temperatures differ."""
        options, stats = made.options, made.stats
        if self.away_T is not None and options.temperature == options.distill_temperature:
            scale_T = self.away_T if self.scale_T is None else self.scale_T + self.away_T
            return [SoftmaxTerm(stats.lse_T, options.temperature, scale_T, self.slope_T)]
        terms = []
        if self.scale_T is not None:
            terms.append(SoftmaxTerm(stats.lse_T, options.temperature, self.scale_T, self.slope_T))
        if self.away_T is not None:
            terms.append(SoftmaxTerm(stats.lse_distill_T, options.distill_temperature, self.away_T))
        return terms

    def at_sampled(self, made: TopKPass) -> Tensor:
        """Compute the gradient [T] at the sampled token, as if it were not in the support."""
        assert self.logprob_T is not None and self.scale_T is not None
        stats, options = made.stats, made.options
        value_T = self.logprob_T + _dense_value(made.logprobs_T, self.scale_T, self.slope_T)
        if self.away_T is not None:
            value_T = (
                value_T + (stats.sampled_T / options.distill_temperature - stats.lse_distill_T).exp() * self.away_T
            )
        return value_T

    def at_support(self, made: TopKPass) -> Tensor:
        """Compute the gradient [R, K] at the tokens of the support, also if the sampled token is one of them."""
        stats, target = made.stats, made.entries.target
        assert target is not None and made.terms is not None and self.divergence_R is not None
        assert stats.support_RK is not None

        def column(values_T: Tensor) -> Tensor:
            return at_rows(values_T, target.rows).unsqueeze(-1)

        value_RK = self.divergence_R.unsqueeze(-1) * made.terms.grad_RK
        if self.scale_T is not None:
            lq_RK = (stats.support_RK / made.options.temperature).sub_(column(stats.lse_T))
            slope_R1 = None if self.slope_T is None else column(self.slope_T)
            value_RK += _dense_value(lq_RK, column(self.scale_T), slope_R1)
        if self.logprob_T is not None:
            value_RK += column(self.logprob_T) * (target.ids_TK == column(made.ids_T))
        return value_RK


def _dense_value(lq: Tensor, scale: Tensor, slope: Tensor | None) -> Tensor:
    return lq.exp() * (scale if slope is None else scale + slope * lq)
