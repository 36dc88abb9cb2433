"""The divergences, entry by entry: the summand t(p, q) and its weighted derivative r = q * dt/dq.

For D = sum_v t(p_v, q_v) with q = softmax(z), the chain rule through the softmax gives

    dD/dz_u = r_u - q_u * sum_v r_v,

so t and r define a divergence completely: over k entries, over k entries and a bucket, or over a whole vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from megatron_hdpo.types.divergences import DivergenceKind, DivergenceTail

KINDS: tuple[str, ...] = get_args(DivergenceKind)
TAILS: tuple[str, ...] = get_args(DivergenceTail)

# Log-probability of an impossible token: finite, so that 0 * log 0 is 0; its exp is 0 in every dtype.
LOG_ZERO = -1e30


@dataclass(frozen=True)
class DivergenceSpec:
    """A divergence between student q and teacher p; raises ValueError for combinations without meaning.

    kind: `jsd` b KL(p|M) + (1-b) KL(q|M) with M = bp + (1-b)q, the teacher weighted by b = beta, forward KL at b = 0
        and reverse KL at b = 1 (GKD, arXiv 2306.13649); `forward_kl` KL(p|q); `reverse_kl` KL(q|p);
        `skew_forward` KL(p | a p + (1-a) q), `skew_reverse` KL(q | (1-a) p + a q), a = beta (DistiLLM, 2402.03898);
        `akl` (2404.02657) forward and reverse KL mixed by their gaps on head and tail, head mass beta.
    tail: how a TopK target is completed outside its support S; full targets have no tail and ignore it.
        `outside`: the teacher is renormalised on S and 0 outside, the student is over the full vocabulary; `literal`:
        the same with the constant that the HDPO paper prints; `bucket`: both sides keep their mass outside S as one
        extra entry; `renormalise`: both sides are renormalised on S.
    clip: every entry's summand is limited to this value before the sum (OPSD); a limited entry has gradient 0.
    """

    kind: str = "jsd"
    beta: float = 0.5
    tail: str = "outside"
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown divergence kind {self.kind!r}: choose one of {', '.join(KINDS)}")
        if self.tail not in TAILS:
            raise ValueError(f"unknown tail {self.tail!r}: choose one of {', '.join(TAILS)}")
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"beta is {self.beta}: it must lie in [0, 1]")
        if self.clip is not None and not self.clip > 0.0:
            raise ValueError(f"clip is {self.clip}: it must be positive, or None for no clip")

    def check_topk(self) -> None:
        """Raise ValueError if kind and tail cannot be combined for a TopK target."""
        base = self.base
        if self.tail == "literal" and not (self.kind == "jsd" and self.beta == 0.5 and self.clip is None):
            raise ValueError(
                "tail 'literal' is the constant printed for the JSD with beta 0.5 and no clip; use tail 'outside', "
                "which is exact for every beta"
            )
        if self.tail == "outside" and base in ("reverse_kl", "akl"):
            raise ValueError(
                f"{self.kind} (beta {self.beta}) with tail 'outside' is infinite: the teacher is zero outside its "
                "top-k while the student is not; use tail 'bucket', which keeps the teacher's other mass as one entry"
            )

    @property
    def base(self) -> str:
        """The kind that is computed: beta 0 and beta 1 become forward or reverse KL."""
        if self.kind == "jsd" and self.beta in (0.0, 1.0):
            return "forward_kl" if self.beta == 0.0 else "reverse_kl"
        if self.beta == 0.0 and self.kind in ("skew_forward", "skew_reverse"):
            return "forward_kl" if self.kind == "skew_forward" else "reverse_kl"
        return self.kind

    @property
    def outside_constant(self) -> float:
        """The constant c such that an entry with p = 0 has t = c q and dt/dq = c."""
        if self.tail == "literal":
            return math.log(2.0)
        if self.base == "jsd":
            return (1.0 - self.beta) * -math.log1p(-self.beta)
        if self.base == "skew_reverse":
            return -math.log(self.beta)
        return 0.0


JSD = DivergenceSpec()
"""The default of all functions here: the Jensen-Shannon divergence (beta 0.5) with tail `outside` and no clip."""


def summands(
    spec: DivergenceSpec,
    lp: Tensor,
    lq: Tensor,
    weights: tuple[Tensor, Tensor] | None = None,
    pq: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute t and r = q dt/dq of each entry from the log-probs of teacher (lp) and student (lq), of one shape.

    weights: of forward and reverse KL for `akl`, [..., 1] each. pq: the probabilities, if they are already computed.
    """
    p, q = (lp.exp(), lq.exp()) if pq is None else pq
    t, r = _raw_summands(spec, lp, lq, p=p, q=q, weights=weights)
    if spec.clip is not None:
        r = r.masked_fill(t > spec.clip, 0.0)
        t = t.clamp(max=spec.clip)
    return t, r


def _raw_summands(
    spec: DivergenceSpec, lp: Tensor, lq: Tensor, *, p: Tensor, q: Tensor, weights: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    b, base = spec.beta, spec.base
    if base == "forward_kl":
        return p * (lp - lq), -p
    if base == "reverse_kl":
        t = q * (lq - lp)
        return t, t + q
    if base == "akl":
        assert weights is not None
        reverse = q * (lq - lp)
        return weights[0] * (p * (lp - lq)) + weights[1] * reverse, weights[1] * (reverse + q) - weights[0] * p
    share = 1.0 - b if base == "skew_reverse" else b  # the teacher's share of the mixture
    # Where both probabilities underflow the mixture must not be 0: the summand is then 0 * finite.
    mix = (share * p + (1.0 - share) * q).clamp_min(torch.finfo(p.dtype).tiny)
    lm = mix.log()
    if base == "jsd":
        r = (1.0 - b) * q * (lq - lm)
        return b * p * (lp - lm) + r, r
    if base == "skew_forward":
        return p * (lp - lm), -(1.0 - b) * p * (q / mix)
    t = q * (lq - lm)
    return t, t + q * (1.0 - b * (q / mix))


def needs_dense(spec: DivergenceSpec) -> bool:
    """Return whether a TopK target needs the summand of every token of the vocabulary.

    That is so with a clip and a tail whose entries are not 0: the clip then acts on each entry by itself.
    """
    return spec.clip is not None and spec.tail == "outside" and spec.outside_constant > 0.0


def akl_weights(lp: Tensor, lq: Tensor, mu: float) -> tuple[Tensor, Tensor]:
    """Compute AKL's weights [..., 1] of forward and reverse KL (arXiv 2404.02657); they are constants of the loss.

    The head is the teacher's most likely entries whose cumulative mass stays within mu; it always contains the most
    likely entry, and entries of equal probability are all in it or all outside. The forward KL gets the head's share of
    sum |p - q|, the reverse KL the rest.
    """
    gap = (lp.exp() - lq.exp()).abs()
    p, order = lp.exp().sort(dim=-1, descending=True)
    last = torch.cat([p[..., 1:] != p[..., :-1], torch.ones_like(p[..., :1], dtype=torch.bool)], dim=-1)
    group_mass = p.cumsum(-1).masked_fill(~last, torch.inf).flip(-1).cummin(-1).values.flip(-1)
    inside = (group_mass <= mu) | (p == p[..., :1]) | (mu >= 1.0)  # rounding may take a sum of probabilities above 1
    head = (gap.gather(-1, order) * inside).sum(-1, keepdim=True)
    forward = head / gap.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
    return forward, 1.0 - forward
