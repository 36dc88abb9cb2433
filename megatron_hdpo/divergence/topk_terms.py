"""Value, gradient and diagnostics of a divergence to a top-k target, from the student's log-probs on the support.

Everything here costs O(tokens x k) and is local to the rank: no collective is needed once the student's normaliser is
known.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megatron_hdpo.divergence.kinds import LOG_ZERO, DivergenceSpec, akl_weights, summands

# Rounded teacher probabilities may sum to more than 1: the tail bucket keeps at least this mass.
TAIL_FLOOR = 1e-7


@dataclass(frozen=True)
class SupportTerms:
    """Per target row: the divergence, its gradient to the student's logits (at temperature 1), and diagnostics.

    grad_RK: gradient at the k ids. outside_R: gradient at every other token u, divided by q_u.
    mass_R: sum_S q. covered_R: sum_S min(p^, q), p^ renormalised on S. top_R: q at the teacher's most likely token.
    """

    value_R: Tensor
    grad_RK: Tensor
    outside_R: Tensor
    mass_R: Tensor
    covered_R: Tensor
    top_R: Tensor

    @classmethod
    def joined(cls, parts: list[SupportTerms]) -> SupportTerms:
        """Concatenate the terms of successive blocks of rows."""
        if len(parts) == 1:
            return parts[0]
        return cls(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)))


def support_terms(
    spec: DivergenceSpec,
    *,
    lp_RK: Tensor,
    lq_RK: Tensor,
    used_RK: Tensor,
    rest_R: Tensor | None,
    vocab_size: int,
) -> SupportTerms:
    """Compute the terms of a divergence on the support.

    lp_RK, lq_RK: log-probs of teacher and student over the full vocabulary; used_RK: which entries are in the support.
    rest_R: the student's mass outside the support, summed over those tokens (tail `bucket` only; 1 - sum_S q would be
    rounding noise).
    """
    lp_RK = lp_RK.masked_fill(~used_RK, LOG_ZERO)
    lq_RK = lq_RK.masked_fill(~used_RK, LOG_ZERO)
    some_R1 = used_RK.any(dim=-1, keepdim=True)
    lp_hat_RK = lp_RK - lp_RK.logsumexp(-1, keepdim=True).masked_fill(~some_R1, 0.0)
    q_RK = lq_RK.exp()
    if spec.tail == "renormalise":
        value_R, grad_RK, outside_R = _renormalised(spec, lp_hat_RK, lq_RK, some_R1)
    elif spec.tail == "bucket":
        assert rest_R is not None
        whole_R = used_RK.sum(-1) >= vocab_size
        value_R, grad_RK, outside_R = _bucket(spec, lp_RK, lq_RK, rest_R, whole_R)
    else:
        value_R, grad_RK, outside_R = _outside(spec, lp_hat_RK, lq_RK)
    none_R = ~some_R1.squeeze(-1)
    top_R = q_RK.gather(-1, lp_RK.argmax(-1, keepdim=True)).squeeze(-1)
    return SupportTerms(
        value_R=value_R.masked_fill(none_R, 0.0),
        grad_RK=grad_RK.masked_fill(~used_RK, 0.0),
        outside_R=outside_R.masked_fill(none_R, 0.0),
        mass_R=q_RK.sum(-1),
        covered_R=torch.minimum(lp_hat_RK.exp(), q_RK).sum(-1),
        top_R=top_R,
    )


_Terms = tuple[Tensor, Tensor, Tensor]


def _terms(spec: DivergenceSpec, lp: Tensor, lq: Tensor) -> tuple[Tensor, Tensor]:
    weights = akl_weights(lp, lq, spec.beta) if spec.base == "akl" else None
    return summands(spec, lp, lq, weights)


def _outside(spec: DivergenceSpec, lp_hat_RK: Tensor, lq_RK: Tensor) -> _Terms:
    """Compare with the teacher renormalised on S and zero outside, where every token adds c q."""
    t_RK, r_RK = _terms(spec, lp_hat_RK, lq_RK)
    q_RK = lq_RK.exp()
    rest_R = (1.0 - q_RK.sum(-1)).clamp_min(0.0)
    c = spec.outside_constant
    mean_R = r_RK.sum(-1) + c * rest_R
    return t_RK.sum(-1) + c * rest_R, r_RK - q_RK * mean_R.unsqueeze(-1), c - mean_R


def _bucket(spec: DivergenceSpec, lp_RK: Tensor, lq_RK: Tensor, rest_R: Tensor, whole_R: Tensor) -> _Terms:
    """Compare k entries and one bucket of all other tokens.

    whole_R: rows whose support is the whole vocabulary; they have no bucket.
    """
    tiny = torch.finfo(rest_R.dtype).tiny
    p_tail_R = (1.0 - lp_RK.double().exp().sum(-1)).clamp_min(TAIL_FLOOR)  # a difference: in double precision
    lp_tail_R = p_tail_R.log().to(lp_RK.dtype).masked_fill(whole_R, LOG_ZERO)
    q_tail_R = rest_R.clamp_min(tiny)
    lq_tail_R = q_tail_R.log().masked_fill(whole_R, LOG_ZERO)
    lp = torch.cat([lp_RK, lp_tail_R.unsqueeze(-1)], dim=-1)
    lq = torch.cat([lq_RK, lq_tail_R.unsqueeze(-1)], dim=-1)
    t, r = _terms(spec, lp, lq)
    mean_R = r.sum(-1)
    grad_RK = r[..., :-1] - lq_RK.exp() * mean_R.unsqueeze(-1)
    return t.sum(-1), grad_RK, r[..., -1] / q_tail_R - mean_R


def _renormalised(spec: DivergenceSpec, lp_hat_RK: Tensor, lq_RK: Tensor, some_R1: Tensor) -> _Terms:
    """Compare both sides renormalised on S; tokens outside S get no gradient."""
    lq_hat_RK = lq_RK - lq_RK.logsumexp(-1, keepdim=True).masked_fill(~some_R1, 0.0)
    t_RK, r_RK = _terms(spec, lp_hat_RK, lq_hat_RK)
    grad_RK = r_RK - lq_hat_RK.exp() * r_RK.sum(-1, keepdim=True)
    return t_RK.sum(-1), grad_RK, torch.zeros_like(t_RK[..., 0])
