"""Log-prob of the sampled token, entropy and divergence of every token, from one pass over sharded logits.

    forward:  read the logits once -> all-reduce MAX of [T] -> all-reduce SUM of O(T + R k) numbers -> O(R k) arithmetic
    backward: no communication; read the logits once, write the gradient once, into their own storage when allowed

With q = softmax(z / t_s) at the sampling temperature and w = softmax(z / t_d) at the distillation's, the gradient is

    g_u = (1/t_s) [ gl (1[u = y] - q_u) - gh q_u (ln q_u + H) ] + (1/t_d) gd * (G_u on the support, w_u a elsewhere),

a row-wise multiple of a softmax (two, if the temperatures differ) and k + 1 exceptions, which overwrite it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_hdpo.divergence.kinds import DivergenceSpec
from megatron_hdpo.divergence.shard import Group, OwnedEntries, Shard, compute_dtype
from megatron_hdpo.divergence.support import SupportTerms, support_terms
from megatron_hdpo.divergence.sweep import SoftmaxTerm, local_stats, shift_stats, write_dense
from megatron_hdpo.divergence.targets import Target, TopK, check_ids


@dataclass(frozen=True)
class Losses:
    """Per-token quantities, float32 (float64 for float64 logits), in the leading shape of the logits.

    Differentiable: logprobs_T, ln q of the sampled token at the sampling temperature (0 where the id is -1; None
    without ids); entropy_T, of the same distribution, in nats (None if not asked for); divergence_T, at the distillation
    temperature (None without a target; 0 for tokens that have none).
    Diagnostics without gradient, 0 for tokens that have no target, at the distillation temperature:
    student_mass_T, the student's mass on the support; covered_mass_T, sum over it of min(p^, q), with p^ the teacher
    renormalised on the support and q the student's full softmax; teacher_top_T, q at the teacher's first choice.
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
    kind: str = "jsd",
    beta: float = 0.5,
    tail: str = "outside",
    clip: float | None = None,
    distill_temperature: float = 1.0,
    temperature: float = 1.0,
    entropy: bool = True,
    group: Group = None,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
) -> Losses:
    """Everything that a step needs from the logits, in one pass and differentiable; see Losses.

    logits_TV_local: [..., V / tp], this rank's contiguous shard of the vocabulary, finite. sampled_ids_T: int64 [...],
    global ids, -1 for tokens without one. target: TopK, FullLogits or Hidden; it may cover a subset of the tokens.
    kind, beta, tail, clip: see DivergenceSpec. temperature: of log-probs and entropy. distill_temperature: divides the
    student's logits for the divergence, and the logits of a full target; a TopK must come at it already. There is no
    factor of temperature squared. vocab_size: tokens from this id on are padding, without probability or gradient.
    inplace_backward: the gradient overwrites the logits' storage (contiguous logits only; nobody else may need them).
    Every rank of the group must call with the same shapes and options. Raises ValueError on input that cannot be.
    """
    spec = DivergenceSpec(kind, beta, tail, clip)
    _check_temperatures(temperature, distill_temperature)
    lead, width = logits_TV_local.shape[:-1], logits_TV_local.shape[-1]
    logits_TV = logits_TV_local.reshape(-1, width)
    shard = Shard.of(width, group, vocab_size)
    ids_T = None if sampled_ids_T is None else flat_ids(sampled_ids_T, lead, shard.vocab_size, logits_TV.device)
    plan = _Plan(shard, spec, temperature, distill_temperature, ids_T is not None, entropy, inplace_backward)
    if target is None:
        outputs = _TopKLosses.apply(logits_TV, ids_T, None, None, None, plan)
    elif isinstance(target, TopK):
        spec.check_topk()
        flat = target.flat(logits_TV.shape[0], shard.vocab_size, logits_TV.device)
        outputs = _TopKLosses.apply(logits_TV, ids_T, flat.ids_TK, flat.logprobs_TK, flat.rows, plan)
    else:
        raise NotImplementedError("full-vocabulary targets")
    return Losses(*(None if out is None else out.view(lead) for out in outputs))


def divergence(
    logits_TV_local: Tensor,
    target: Target,
    kind: str = "jsd",
    beta: float = 0.5,
    tail: str = "outside",
    clip: float | None = None,
    temperature: float = 1.0,
    group: Group = None,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    """Divergence of every token [...] to a target, differentiable in the logits; arguments as in logit_losses.

    temperature is that of the divergence (logit_losses' distill_temperature).
    """
    losses = logit_losses(
        logits_TV_local,
        None,
        target,
        kind=kind,
        beta=beta,
        tail=tail,
        clip=clip,
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
    group: Group = None,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    """Entropy in nats of softmax(logits / temperature), [...], differentiable; arguments as in logit_losses."""
    losses = logit_losses(
        logits_TV_local,
        None,
        temperature=temperature,
        distill_temperature=temperature,
        group=group,
        vocab_size=vocab_size,
        inplace_backward=inplace_backward,
    )
    assert losses.entropy_T is not None
    return losses.entropy_T


def flat_ids(ids_T: Tensor, lead: torch.Size, vocab_size: int, device: torch.device) -> Tensor:
    """int64 [T] on the device; raises ValueError on another shape than the tokens' or ids beyond the vocabulary."""
    if ids_T.shape != lead:
        raise ValueError(f"sampled ids have shape {list(ids_T.shape)}, the logits' tokens {list(lead)}")
    flat_T = ids_T.detach().reshape(-1).to(device=device, dtype=torch.int64)
    check_ids(flat_T, vocab_size, "sampled_ids")
    return flat_T


def _check_temperatures(*temperatures: float) -> None:
    if not all(t > 0.0 for t in temperatures):
        raise ValueError(f"temperatures are {temperatures}: they must be positive (greedy decoding counts as 1)")


@dataclass(frozen=True)
class _Plan:
    """What one pass computes, besides its tensors."""

    shard: Shard
    spec: DivergenceSpec
    temperature: float
    distill_temperature: float
    logprobs: bool
    entropy: bool
    inplace: bool


@dataclass(frozen=True)
class _Reduced:
    """The group's statistics: normalisers of both temperatures, entropy, and the logits that were asked for."""

    lse_T: Tensor
    lse_distill_T: Tensor
    entropy_T: Tensor
    sampled_T: Tensor
    support_RK: Tensor
    rest_R: Tensor | None


class _TopKLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: Tensor,
        ids_T: Tensor | None,
        ids_RK: Tensor | None,
        logprobs_RK: Tensor | None,
        rows: Tensor | None,
        plan: _Plan,
    ) -> tuple[Tensor | None, ...]:
        shard, dtype = plan.shard, compute_dtype(logits_TV)
        if ids_T is None:
            ids_T = torch.full(logits_TV.shape[:1], -1, device=logits_TV.device)
        if ids_RK is None or logprobs_RK is None:
            ids_RK = ids_T.new_empty((0, 1))
            logprobs_RK = logits_TV.new_empty((0, 1), dtype=dtype)
            rows, distills = ids_T.new_empty(0), False
        else:
            distills = True
        used_RK = (ids_RK >= 0) & (logprobs_RK > -torch.inf)
        ids_RK = ids_RK.masked_fill(~used_RK, -1)
        owned = OwnedEntries.find(ids_RK, rows, shard)
        sampled = OwnedEntries.find(ids_T.unsqueeze(-1), None, shard)
        red = _reduce(logits_TV, sampled, owned, ids_RK, rows, plan, distills)
        lse_R = red.lse_distill_T if rows is None else red.lse_distill_T[rows]
        lq_RK = red.support_RK / plan.distill_temperature - lse_R.unsqueeze(-1)
        rest_R = None if red.rest_R is None else red.rest_R
        terms = support_terms(plan.spec, logprobs_RK.to(dtype), lq_RK, used_RK, rest_R, shard.vocab_size)
        logprob_T = (red.sampled_T / plan.temperature - red.lse_T).masked_fill(ids_T < 0, 0.0)
        ctx.plan, ctx.distills, ctx.owned, ctx.sampled = plan, distills, owned, sampled
        ctx.save_for_backward(
            logits_TV, ids_T, ids_RK, rows, red.lse_T, red.lse_distill_T, red.entropy_T, logprob_T,
            red.support_RK, terms.grad_RK, terms.outside_R,
        )  # fmt: skip
        return _outputs(ctx, plan, logprob_T, red.entropy_T, terms if distills else None, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        gl_T, gh_T, gd_T = grads[:3]
        gl_T = gl_T if ctx.plan.logprobs else None
        gh_T = gh_T if ctx.plan.entropy else None
        gd_T = gd_T if ctx.distills else None
        return _gradient(ctx, gl_T, gh_T, gd_T), None, None, None, None, None


def _reduce(
    logits_TV: Tensor,
    sampled: OwnedEntries,
    owned: OwnedEntries,
    ids_RK: Tensor,
    rows: Tensor | None,
    plan: _Plan,
    distills: bool,
) -> _Reduced:
    """Sweep the shard and join the ranks: two all-reduces, whatever the target."""
    shard, dtype, tokens = plan.shard, compute_dtype(logits_TV), logits_TV.shape[0]
    one_temperature = plan.temperature == plan.distill_temperature or not distills
    holes = owned if distills and plan.spec.tail == "bucket" else None
    stats = local_stats(
        logits_TV, shard, plan.temperature, entropy=plan.entropy, holes=holes if one_temperature else None
    )
    other = stats
    if not one_temperature:
        other = local_stats(logits_TV, shard, plan.distill_temperature, holes=holes)
    max_T = shard.all_reduce_max_(stats.max_T.clone())
    stats = shift_stats(stats, max_T, plan.temperature)
    other = stats if one_temperature else shift_stats(other, max_T, plan.distill_temperature)
    local = {
        "sum": stats.sum_T,
        "sampled": sampled.gather(logits_TV, torch.Size((tokens, 1)), dtype).squeeze(-1),
        "support": owned.gather(logits_TV, ids_RK.shape, dtype),
    }
    if stats.energy_T is not None:
        local["energy"] = stats.energy_T
    if not one_temperature:
        local["other"] = other.sum_T
    if other.rest_T is not None:
        local["rest"] = other.rest_T if rows is None else other.rest_T[rows]
    total = dict(zip(local, shard.all_reduce_sum(list(local.values())), strict=True))
    sum_d_T = total.get("other", total["sum"])
    lse_T = max_T / plan.temperature + total["sum"].log()
    lse_d_T = lse_T if one_temperature else max_T / plan.distill_temperature + sum_d_T.log()
    entropy_T = total["sum"].log() - total["energy"] / total["sum"] if "energy" in total else torch.zeros_like(lse_T)
    rest_R = total["rest"] / (sum_d_T if rows is None else sum_d_T[rows]) if "rest" in total else None
    return _Reduced(lse_T, lse_d_T, entropy_T, total["sampled"], total["support"], rest_R)


def _outputs(
    ctx: Any, plan: _Plan, logprob_T: Tensor, entropy_T: Tensor, terms: SupportTerms | None, rows: Tensor | None
) -> tuple[Tensor | None, ...]:
    ctx.set_materialize_grads(False)
    tokens = logprob_T.shape[0]
    diagnostics: list[Tensor | None] = [None, None, None]
    value_T = None
    if terms is not None:
        value_T = spread(terms.value_R, rows, tokens)
        diagnostics = [spread(x, rows, tokens) for x in (terms.mass_R, terms.covered_R, terms.top_R)]
        ctx.mark_non_differentiable(*diagnostics)
    return (logprob_T if plan.logprobs else None, entropy_T if plan.entropy else None, value_T, *diagnostics)


def spread(values_R: Tensor, rows: Tensor | None, tokens: int) -> Tensor:
    """[R] -> [T]: each value at its token, 0 at tokens that have none."""
    if rows is None:
        return values_R
    out_T = torch.zeros(tokens, dtype=values_R.dtype, device=values_R.device)
    out_T[rows] = values_R
    return out_T


def _gradient(ctx: Any, gl_T: Tensor | None, gh_T: Tensor | None, gd_T: Tensor | None) -> Tensor:
    (logits_TV, ids_T, ids_RK, rows, lse_T, lse_d_T, entropy_T, logprob_T, support_RK, grad_RK, outside_R) = (
        ctx.saved_tensors
    )
    plan: _Plan = ctx.plan
    shard, tokens = plan.shard, logits_TV.shape[0]
    zeros_T = torch.zeros_like(lse_T)
    valid_T = ids_T >= 0
    gl_T = None if gl_T is None else (gl_T * valid_T) / plan.temperature
    gh_T = None if gh_T is None else gh_T / plan.temperature
    gd_T = None if gd_T is None else gd_T / plan.distill_temperature
    # Dense part at the sampling temperature: q (scale + slope ln q).
    scale_T = zeros_T - (0.0 if gl_T is None else gl_T) - (0.0 if gh_T is None else gh_T * entropy_T)
    slope_T = None if gh_T is None else -gh_T
    # Dense part of the divergence, away from the support.
    away_T = None if gd_T is None else gd_T * spread(outside_R, rows, tokens)

    same = plan.temperature == plan.distill_temperature
    terms = []
    if gl_T is not None or gh_T is not None or (same and away_T is not None):
        merged_T = scale_T + away_T if same and away_T is not None else scale_T
        terms.append(SoftmaxTerm(lse_T, plan.temperature, merged_T, slope_T))
    if away_T is not None and not same:
        terms.append(SoftmaxTerm(lse_d_T, plan.distill_temperature, away_T))

    # Exceptions, complete values: the sampled token first, then the support, which may contain it.
    def base(lq: Tensor, pick: Any) -> Tensor:
        slope = 0.0 if slope_T is None else pick(slope_T) * lq
        return lq.exp() * (pick(scale_T) + slope)

    at_sampled_T = base(logprob_T, lambda x: x)
    if gl_T is not None:
        at_sampled_T = at_sampled_T + gl_T
    if away_T is not None:
        lw_T = (logprob_T + lse_T) * (plan.temperature / plan.distill_temperature) - lse_d_T
        at_sampled_T = at_sampled_T + lw_T.exp() * away_T
    at_support_RK = None
    if gd_T is not None:

        def pick(x_T: Tensor) -> Tensor:
            return (x_T if rows is None else x_T[rows]).unsqueeze(-1)

        lq_RK = support_RK / plan.temperature - pick(lse_T)
        at_support_RK = base(lq_RK, pick) + pick(gd_T) * grad_RK
        if gl_T is not None:
            at_support_RK = at_support_RK + pick(gl_T) * (ids_RK == pick(ids_T))

    reuse = plan.inplace and logits_TV.is_contiguous()
    grad_TV = logits_TV.detach() if reuse else torch.empty_like(logits_TV, memory_format=torch.contiguous_format)
    write_dense(grad_TV, logits_TV, shard, terms)
    if gl_T is not None:
        ctx.sampled.write(at_sampled_T.unsqueeze(-1), grad_TV)
    if at_support_RK is not None:
        ctx.owned.write(at_support_RK, grad_TV)
    return grad_TV
