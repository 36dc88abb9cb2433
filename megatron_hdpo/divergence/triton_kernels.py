"""Triton kernels of the top-k pass: one read of the logits forward, one read and one write backward.

One program handles one token. Every load is cast to float32 at once: arithmetic in bfloat16 would lose digits on a GPU
and is wrong in Triton's interpreter.
"""

# Triton infers the types of these functions itself; Python annotations would have no meaning.
# mypy: disable-error-code="no-untyped-def, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

# Codes of the base kinds and tails in the kernels.
KIND_CODES = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2, "skew_forward": 3, "skew_reverse": 4}
TAIL_CODES = {"outside": 0, "literal": 0, "bucket": 1, "renormalise": 2}

_LOG_ZERO = tl.constexpr(-1e30)
_TINY = tl.constexpr(1.1754943508222875e-38)
_NO_ID = tl.constexpr(2147483647)


@triton.jit
def stats_kernel(
    z_ptr, z_stride, ids_ptr, row_ptr, support_ids_ptr, sorted_ids_ptr,
    max_ptr, sum_ptr, energy_ptr, other_ptr, sampled_ptr, support_ptr, rest_ptr,
    start, valid, inv_t, inv_d, k,
    ENTROPY: tl.constexpr, TWO: tl.constexpr, TARGET: tl.constexpr, REST: tl.constexpr,
    K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the row statistics of a shard relative to its own maximum, and the logits at sampled and support ids.

    rest: sum of e over tokens outside the support, summed directly (a difference would be rounding noise); the loop
    walks along the sorted ids, of which a block holds one or two.
    """
    t = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + t * z_stride
    r = tl.load(row_ptr + t).to(tl.int64) if TARGET else t
    top = -float("inf")
    total, energy, other, rest = 0.0, 0.0, 0.0, 0.0
    slot = 0
    hole = slot + _NO_ID
    if REST:
        hole = tl.load(sorted_ids_ptr + r * k, mask=r >= 0, other=_NO_ID)
    inv_rest = inv_d if TWO else inv_t
    for begin in range(0, valid, BLOCK):
        cols = begin + tl.arange(0, BLOCK)
        z = tl.load(z_row + cols, mask=cols < valid, other=-float("inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(z, axis=0))
        d = (z - new_top) * inv_t
        e = tl.exp(d)
        # In the first block top is -inf: the bound avoids -inf times 0.
        gap = tl.maximum(top - new_top, _LOG_ZERO)
        shift = tl.exp(gap * inv_t)
        if ENTROPY:
            block_energy = tl.sum(tl.where(cols < valid, e * d, 0.0), axis=0)
            energy = (energy + total * tl.maximum(gap * inv_t, _LOG_ZERO)) * shift + block_energy
        total = total * shift + tl.sum(e, axis=0)
        if TWO:
            e = tl.exp((z - new_top) * inv_d)
            other = other * tl.exp(gap * inv_d) + tl.sum(e, axis=0)
        if REST:
            while hole < start + begin + BLOCK:
                e = tl.where(cols + start == hole, 0.0, e)
                slot += 1
                hole = tl.load(sorted_ids_ptr + r * k + slot, mask=slot < k, other=_NO_ID)
            rest = rest * tl.exp(gap * inv_rest) + tl.sum(e, axis=0)
        top = new_top
    tl.store(max_ptr + t, top)
    tl.store(sum_ptr + t, total)
    if ENTROPY:
        tl.store(energy_ptr + t, energy)
    if TWO:
        tl.store(other_ptr + t, other)
    if REST:
        tl.store(rest_ptr + t, rest)
    local = tl.load(ids_ptr + t) - start
    mine = (local >= 0) & (local < valid)
    tl.store(sampled_ptr + t, tl.load(z_row + local, mask=mine, other=0.0).to(tl.float32))
    if TARGET:
        slots = tl.arange(0, K)
        ids = tl.load(support_ids_ptr + r * k + slots, mask=(slots < k) & (r >= 0), other=-1)
        local_K = ids - start
        mine_K = (ids >= 0) & (local_K >= 0) & (local_K < valid)
        z_K = tl.load(z_row + local_K, mask=mine_K, other=0.0).to(tl.float32)
        tl.store(support_ptr + r * k + slots, z_K, mask=(slots < k) & (r >= 0))


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
    top = tl.max(tl.where(used, lp, _LOG_ZERO), axis=0)
    total = tl.sum(tl.where(used, tl.exp(lp - top), 0.0), axis=0)
    return tl.where(total > 0.0, top + tl.log(tl.maximum(total, _TINY)), 0.0)


@triton.jit
def finish_kernel(
    row_ptr, ids_ptr, support_ids_ptr, logprobs_ptr,
    max_ptr, sum_ptr, energy_ptr, other_ptr, sampled_ptr, support_ptr, rest_ptr,
    lse_ptr, lse_d_ptr, entropy_ptr, logprob_ptr, value_ptr, mass_ptr, covered_ptr, top_ptr, grad_ptr, outside_ptr,
    inv_t, inv_d, b, c, clip, vocab_size, tail_floor, k,
    ENTROPY: tl.constexpr, TWO: tl.constexpr, TARGET: tl.constexpr,
    KIND: tl.constexpr, TAIL: tl.constexpr, CLIP: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Compute normalisers, log-prob, entropy, divergence and its gradient on the support from the group's sums."""
    t = tl.program_id(0).to(tl.int64)
    top_z = tl.load(max_ptr + t)
    total = tl.load(sum_ptr + t)
    lse = top_z * inv_t + tl.log(total)
    tl.store(lse_ptr + t, lse)
    if ENTROPY:
        tl.store(entropy_ptr + t, tl.log(total) - tl.load(energy_ptr + t) / total)
    logprob = tl.load(sampled_ptr + t) * inv_t - lse
    tl.store(logprob_ptr + t, tl.where(tl.load(ids_ptr + t) >= 0, logprob, 0.0))
    if TARGET:
        total_d = tl.load(other_ptr + t) if TWO else total
        lse_d = top_z * inv_d + tl.log(total_d)
        tl.store(lse_d_ptr + t, lse_d)
        r_row = tl.load(row_ptr + t).to(tl.int64)
        value, mass, covered, first, outside = 0.0, 0.0, 0.0, 0.0, 0.0
        if r_row >= 0:
            slots = tl.arange(0, K)
            ids = tl.load(support_ids_ptr + r_row * k + slots, mask=slots < k, other=-1)
            used = ids >= 0
            lp = tl.load(logprobs_ptr + r_row * k + slots, mask=used, other=_LOG_ZERO).to(tl.float32)
            z = tl.load(support_ptr + r_row * k + slots, mask=slots < k, other=0.0)
            lq = tl.where(used, z * inv_d - lse_d, _LOG_ZERO)
            q = tl.exp(lq)
            lp_hat = tl.where(used, lp - _log_sum(lp, used), _LOG_ZERO)
            mass = tl.sum(q, axis=0)
            covered = tl.sum(tl.minimum(tl.exp(lp_hat), q), axis=0)
            first = tl.sum(tl.where(slots == tl.argmax(lp, axis=0), q, 0.0), axis=0)
            if TAIL == 0:
                t_K, r_K = _summands(lp_hat, lq, tl.exp(lp_hat), q, b, clip, KIND, CLIP)
                rest = tl.maximum(1.0 - mass, 0.0)
                mean = tl.sum(r_K, axis=0) + c * rest
                value = tl.sum(t_K, axis=0) + c * rest
                grad = r_K - q * mean
                outside = c - mean
            elif TAIL == 1:
                p = tl.exp(lp)
                p_tail = 1.0 - tl.sum(tl.where(used, tl.exp(lp.to(tl.float64)), 0.0), axis=0)
                p_tail = tl.maximum(p_tail, tail_floor).to(tl.float32)
                q_tail = tl.maximum(tl.load(rest_ptr + t) / total_d, _TINY)
                t_K, r_K = _summands(lp, lq, p, q, b, clip, KIND, CLIP)
                t_tail, r_tail = _summands(tl.log(p_tail), tl.log(q_tail), p_tail, q_tail, b, clip, KIND, CLIP)
                whole = tl.sum(used.to(tl.int32), axis=0) >= vocab_size  # then there is no bucket
                t_tail = tl.where(whole, 0.0, t_tail)
                r_tail = tl.where(whole, 0.0, r_tail)
                mean = tl.sum(r_K, axis=0) + r_tail
                value = tl.sum(t_K, axis=0) + t_tail
                grad = r_K - q * mean
                outside = r_tail / q_tail - mean
            else:
                lq_hat = tl.where(used, lq - _log_sum(lq, used), _LOG_ZERO)
                q_hat = tl.exp(lq_hat)
                t_K, r_K = _summands(lp_hat, lq_hat, tl.exp(lp_hat), q_hat, b, clip, KIND, CLIP)
                value = tl.sum(t_K, axis=0)
                grad = r_K - q_hat * tl.sum(r_K, axis=0)
                outside = 0.0
            empty = tl.sum(used.to(tl.int32), axis=0) == 0
            value = tl.where(empty, 0.0, value)
            outside = tl.where(empty, 0.0, outside)
            tl.store(grad_ptr + r_row * k + slots, tl.where(used, grad, 0.0), mask=slots < k)
        tl.store(value_ptr + t, value)
        tl.store(mass_ptr + t, mass)
        tl.store(covered_ptr + t, covered)
        tl.store(top_ptr + t, first)
        tl.store(outside_ptr + t, outside)


@triton.jit
def gradient_kernel(
    z_ptr, z_stride, g_ptr, g_stride, ids_ptr, row_ptr, support_ids_ptr, support_ptr,
    gl_ptr, gh_ptr, gd_ptr, lse_ptr, lse_d_ptr, entropy_ptr, logprob_ptr, sampled_ptr, grad_ptr, outside_ptr,
    start, valid, width, inv_t, inv_d, k,
    LOGPROB: tl.constexpr, ENTROPY: tl.constexpr, TARGET: tl.constexpr, TWO: tl.constexpr,
    K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one row: a multiple of one or two softmaxes, then the special entries. g may be z.

    The special entries are the sampled token and the ids of the support.
    """
    t = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + t * z_stride
    g_row = g_ptr + t * g_stride
    lse = tl.load(lse_ptr + t)
    id_t = tl.load(ids_ptr + t)
    gl, scale, slope, away, gd = 0.0, 0.0, 0.0, 0.0, 0.0
    lse_d = lse
    if LOGPROB:
        gl = tl.where(id_t >= 0, tl.load(gl_ptr + t) * inv_t, 0.0)
        scale -= gl
    if ENTROPY:
        slope = -tl.load(gh_ptr + t) * inv_t
        scale += slope * tl.load(entropy_ptr + t)
    if TARGET:
        r_row = tl.load(row_ptr + t).to(tl.int64)
        gd = tl.load(gd_ptr + t) * inv_d
        away = gd * tl.load(outside_ptr + t)
        lse_d = tl.load(lse_d_ptr + t)
    # The special entries are computed before the row is overwritten, from the logits that the forward gathered.
    at_sampled = 0.0
    if LOGPROB:
        lq_y = tl.load(logprob_ptr + t)
        at_sampled = gl + tl.exp(lq_y) * (scale + slope * lq_y)
        if TARGET:
            at_sampled += away * tl.exp(tl.load(sampled_ptr + t) * inv_d - lse_d)
    dense = scale
    if TARGET and not TWO:
        dense += away
    for begin in range(0, width, BLOCK):
        cols = begin + tl.arange(0, BLOCK)
        z = tl.load(z_row + cols, mask=cols < valid, other=-float("inf")).to(tl.float32)
        lq = z * inv_t - lse
        factor = dense + slope * tl.maximum(lq, _LOG_ZERO) if ENTROPY else dense
        g = tl.exp(lq) * factor
        if TARGET and TWO:
            g += away * tl.exp(z * inv_d - lse_d)
        g = tl.where(cols < valid, g, 0.0)
        tl.store(g_row + cols, g.to(g_ptr.dtype.element_ty), mask=cols < width)
    # The barriers keep the stores of different threads to the same column in program order.
    tl.debug_barrier()
    if LOGPROB:
        local = id_t - start
        mine = (local >= 0) & (local < valid)
        tl.store(g_row + local, at_sampled.to(g_ptr.dtype.element_ty), mask=mine)
        tl.debug_barrier()
    if TARGET:
        slots = tl.arange(0, K)
        here = (slots < k) & (r_row >= 0)
        ids = tl.load(support_ids_ptr + r_row * k + slots, mask=here, other=-1)
        z_K = tl.load(support_ptr + r_row * k + slots, mask=here, other=0.0)
        lq_K = z_K * inv_t - lse
        g_K = gd * tl.load(grad_ptr + r_row * k + slots, mask=here, other=0.0)
        if LOGPROB or ENTROPY:
            g_K += tl.exp(lq_K) * (scale + slope * lq_K)
        g_K += tl.where(ids == id_t, gl, 0.0)
        local_K = ids - start
        mine_K = (ids >= 0) & (local_K >= 0) & (local_K < valid)
        tl.store(g_row + local_K, g_K.to(g_ptr.dtype.element_ty), mask=mine_K)
