"""Triton functions for one row: what follows from its sums, and from the student's logits on the teacher's support."""

# Triton infers the types of these functions itself; Python annotations would have no meaning.
# mypy: disable-error-code="no-untyped-def, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

# Codes of the base kinds and tails in the kernels.
KIND_CODES = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2, "skew_forward": 3, "skew_reverse": 4}
TAIL_CODES = {"outside": 0, "literal": 0, "bucket": 1, "renormalise": 2}

LN2 = tl.constexpr(0.6931471805599453)
LOG_ZERO = tl.constexpr(-1e30)
_TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def exponent(z, rate, ref, FINITE: tl.constexpr):
    """Compute z rate - ref with one rounding. FINITE: -inf becomes finite, for a product with 0; NaN stays NaN."""
    x = tl.fma(z, rate, -ref)
    if FINITE:
        x = tl.maximum(x, LOG_ZERO, propagate_nan=tl.PropagateNan.ALL)
    return x


@triton.jit
def _clipped(t, r, clip, CLIP: tl.constexpr):
    if CLIP:
        r = tl.where(t > clip, 0.0, r)
        t = tl.minimum(t, clip)
    return t, r


@triton.jit
def _summands(lp, lq, p, q, b, clip, KIND: tl.constexpr, CLIP: tl.constexpr):
    """Compute t and r = q dt/dq of the entries, as kinds.summands does."""
    if KIND == 0:
        t = p * (lp - lq)
        r = -p
    elif KIND == 1:
        t = q * (lq - lp)
        r = t + q
    else:
        share = 1.0 - b if KIND == 4 else b
        mix = tl.maximum(share * p + (1.0 - share) * q, _TINY)
        lm = tl.log(mix)
        if KIND == 2:
            r = (1.0 - b) * q * (lq - lm)
            t = b * p * (lp - lm) + r
        elif KIND == 3:
            t = p * (lp - lm)
            r = -(1.0 - b) * p * (q / mix)
        else:
            t = q * (lq - lm)
            r = t + q * (1.0 - b * (q / mix))
    return _clipped(t, r, clip, CLIP)


@triton.jit
def _log_sum(lp, used):
    """Compute the log-sum-exp over the used entries; 0 if there is none."""
    top = tl.max(tl.where(used, lp, LOG_ZERO), axis=0)
    total = tl.sum(tl.where(used, tl.exp(lp - top), 0.0), axis=0)
    return tl.where(total > 0.0, top + tl.log(tl.maximum(total, _TINY)), 0.0)


@triton.jit
def support_terms(
    lp, lq, used, q_tail, b, c, clip, vocab_size, tail_floor,
    KIND: tl.constexpr, TAIL: tl.constexpr, CLIP: tl.constexpr,
):  # fmt: skip
    """Compute value, gradient on the support, gradient outside / q, and the three masses, as topk_terms does.

    lp, lq: log-probs [K] of teacher and student, used: which are in the support; LOG_ZERO where not. q_tail: the
    student's mass outside the support, for the tail `bucket`.
    """
    q = tl.exp(lq)
    lp_hat = tl.where(used, lp - _log_sum(lp, used), LOG_ZERO)
    p_hat = tl.exp(lp_hat)
    mass = tl.sum(q, axis=0)
    covered = tl.sum(tl.minimum(p_hat, q), axis=0)
    first = tl.sum(tl.where(tl.arange(0, lp.shape[0]) == tl.argmax(lp, axis=0), q, 0.0), axis=0)
    if TAIL == 0:
        t, r = _summands(lp_hat, lq, p_hat, q, b, clip, KIND, CLIP)
        rest = c * tl.maximum(1.0 - mass, 0.0)
        mean = tl.sum(r, axis=0) + rest
        value = tl.sum(t, axis=0) + rest
        grad = r - q * mean
        outside = c - mean
    elif TAIL == 1:
        p_tail = 1.0 - tl.sum(tl.where(used, tl.exp(lp.to(tl.float64)), 0.0), axis=0)
        p_tail = tl.maximum(p_tail, tail_floor).to(tl.float32)
        q_tail = tl.maximum(q_tail, _TINY)
        t, r = _summands(lp, lq, tl.exp(lp), q, b, clip, KIND, CLIP)
        t_tail, r_tail = _summands(tl.log(p_tail), tl.log(q_tail), p_tail, q_tail, b, clip, KIND, CLIP)
        whole = tl.sum(used.to(tl.int32), axis=0) >= vocab_size  # then there is no bucket
        t_tail = tl.where(whole, 0.0, t_tail)
        r_tail = tl.where(whole, 0.0, r_tail)
        mean = tl.sum(r, axis=0) + r_tail
        value = tl.sum(t, axis=0) + t_tail
        grad = r - q * mean
        outside = r_tail / q_tail - mean
    else:
        lq_hat = tl.where(used, lq - _log_sum(lq, used), LOG_ZERO)
        q_hat = tl.exp(lq_hat)
        t, r = _summands(lp_hat, lq_hat, p_hat, q_hat, b, clip, KIND, CLIP)
        value = tl.sum(t, axis=0)
        grad = r - q_hat * tl.sum(r, axis=0)
        outside = 0.0
    empty = tl.sum(used.to(tl.int32), axis=0) == 0
    value = tl.where(empty, 0.0, value)
    outside = tl.where(empty, 0.0, outside)
    return value, tl.where(used, grad, 0.0), outside, mass, covered, first


@triton.jit
def finish_row(
    t, r, ref, total, energy, other, sampled, rest, z_K,
    ids_ptr, support_ids_ptr, logprobs_ptr,
    entropy_ptr, logprob_ptr, value_ptr, mass_ptr, covered_ptr, top_ptr, grad_ptr, outside_ptr,
    rate, rate_d, ratio, b, c, clip, vocab_size, tail_floor, k,
    ENTROPY: tl.constexpr, TWO: tl.constexpr, TARGET: tl.constexpr,
    KIND: tl.constexpr, TAIL: tl.constexpr, CLIP: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Store log-prob, entropy, divergence and its gradient on the support of token t, from the group's sums.

    r: its target row, -1 if it has none. z_K: the logits on the support.
    """
    log_total = tl.log(total)
    if ENTROPY:
        tl.store(entropy_ptr + t, log_total - LN2 * energy / total)
    logprob = LN2 * exponent(sampled, rate, ref, False) - log_total
    tl.store(logprob_ptr + t, tl.where(tl.load(ids_ptr + t) >= 0, logprob, 0.0))
    if TARGET:
        ref_d, total_d, log_total_d = ref, total, log_total
        if TWO:
            ref_d, total_d, log_total_d = ref * ratio, other, tl.log(other)
        value, mass, covered, first, outside = 0.0, 0.0, 0.0, 0.0, 0.0
        if r >= 0:
            slots = tl.arange(0, K)
            ids = tl.load(support_ids_ptr + r * k + slots, mask=slots < k, other=-1)
            used = ids >= 0
            lp = tl.load(logprobs_ptr + r * k + slots, mask=used, other=LOG_ZERO).to(tl.float32)
            lq = tl.where(used, LN2 * exponent(z_K, rate_d, ref_d, True) - log_total_d, LOG_ZERO)
            value, grad, outside, mass, covered, first = support_terms(
                lp, lq, used, rest / total_d, b, c, clip, vocab_size, tail_floor, KIND, TAIL, CLIP
            )
            tl.store(grad_ptr + r * k + slots, grad, mask=slots < k)
        tl.store(value_ptr + t, value)
        tl.store(mass_ptr + t, mass)
        tl.store(covered_ptr + t, covered)
        tl.store(top_ptr + t, first)
        tl.store(outside_ptr + t, outside)
