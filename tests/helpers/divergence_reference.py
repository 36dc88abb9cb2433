"""The definitions themselves in float64 over the full vocabulary, one token at a time, differentiated by autograd.

Nothing here is shared with the engine: no sharding, no log-space shortcuts, no hand-written derivative.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOOR = 1e-7  # least mass of a teacher's tail bucket, as documented


def xlog(p: Tensor, x: Tensor) -> Tensor:
    """p ln x, 0 where p is 0."""
    safe = torch.where(p > 0, x, torch.ones_like(x))
    return torch.where(p > 0, p * safe.log(), torch.zeros_like(p))


def summand(kind: str, beta: float, p: Tensor, q: Tensor) -> Tensor:
    """Entry-wise summands of a divergence between two distributions (arXiv 2306.13649, 2402.03898, 2404.02657)."""
    if kind == "jsd" and beta == 0.0:
        kind = "forward_kl"
    if kind == "jsd" and beta == 1.0:
        kind = "reverse_kl"
    if kind == "forward_kl":
        return xlog(p, p / q)
    if kind == "reverse_kl":
        return xlog(q, q / p)
    if kind == "jsd":
        m = beta * p + (1 - beta) * q
        return beta * xlog(p, p / m) + (1 - beta) * xlog(q, q / m)
    if kind == "skew_forward":
        return xlog(p, p / (beta * p + (1 - beta) * q))
    if kind == "skew_reverse":
        return xlog(q, q / ((1 - beta) * p + beta * q))
    assert kind == "akl"
    head = torch.zeros(len(p), dtype=torch.bool)
    for value in sorted(set(p.tolist()), reverse=True):  # entries of one probability stay together
        if beta < 1.0 and float(p[p >= value].sum()) > beta and bool(head.any()):
            break
        head |= p >= value
    gap = (p - q).abs().detach()
    share = float(gap[head].sum() / gap.sum()) if float(gap.sum()) > 0 else 0.0
    return share * xlog(p, p / q) + (1 - share) * xlog(q, q / p)


def total(kind: str, beta: float, clip: float | None, p: Tensor, q: Tensor) -> Tensor:
    t = summand(kind, beta, p, q)
    return (t if clip is None else t.clamp(max=clip)).sum()


def topk_divergence(
    z: Tensor, ids: Tensor, logprobs: Tensor, kind: str, beta: float, tail: str, clip: float | None
) -> Tensor:
    """One token: z [vocab] (temperature applied), ids and log-probs [K] with padding (id < 0 or log-prob -inf)."""
    keep = (ids >= 0) & (logprobs > -math.inf)
    ids, p_full = ids[keep], logprobs[keep].double().exp()
    if len(ids) == 0:
        return z.sum() * 0.0
    q = torch.softmax(z, 0)
    p_hat = torch.softmax(logprobs[keep].double(), 0)
    inside = torch.zeros(len(z), dtype=torch.bool)
    inside[ids] = True
    if tail == "renormalise":
        return total(kind, beta, clip, p_hat, torch.softmax(z[ids], 0))
    if tail == "literal":
        rest = q[~inside].sum()
        return total(kind, beta, None, p_hat, q[ids]) + math.log(2.0) * rest
    if tail == "bucket":
        if bool(inside.all()):
            return total(kind, beta, clip, p_full, q[ids])
        p_tail = (1.0 - p_full.sum()).clamp(min=FLOOR)
        p = torch.cat([p_full, p_tail[None]])
        return total(kind, beta, clip, p, torch.cat([q[ids], q[~inside].sum()[None]]))
    assert tail == "outside"
    p = torch.zeros_like(q).index_put((ids,), p_hat)
    return total(kind, beta, clip, p, q)


def full_divergence(z: Tensor, teacher: Tensor, kind: str, beta: float, clip: float | None) -> Tensor:
    """One token: student's and teacher's logits [vocab], temperature applied."""
    return total(kind, beta, clip, torch.softmax(teacher.double(), 0), torch.softmax(z, 0))


def logprob_entropy(z: Tensor, token: int) -> tuple[Tensor, Tensor]:
    """One token: ln q of the sampled token (0 if there is none) and the entropy."""
    q = torch.softmax(z, 0)
    logprob = torch.log_softmax(z, 0)[token] if token >= 0 else z.sum() * 0.0
    return logprob, -xlog(q, q).sum()
