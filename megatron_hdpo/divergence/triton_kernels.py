"""Triton kernels of the top-k pass: one read of the logits forward, one read and one write backward.

One program handles one token. Every load is cast to float32 at once: arithmetic in bfloat16 would lose digits on a GPU
and is wrong in Triton's interpreter.

A GPU runs out of instructions here before it runs out of bandwidth, so an element must cost few of them:

- Exponents are of base 2, with log2(e) / temperature folded into `rate`: exp((z - m) / temperature) takes one fused
  multiply-add and one `ex2`. The product is not rounded before the subtraction, so a sum relative to `ref` has full
  precision for any float32 number near the largest z rate, as long as everything refers to the same number.
- `ex2` gives 0 below 2^-126. Such a term would be added to a sum of at least 1.
- Every thread keeps its own maximum and sums and rescales them once per block; a row has one reduction, at its end.
- Only one block of a row is masked. It is read first, and the others follow from right to left, so that the next block
  is always on its way while one is summed.
"""

# Triton infers the types of these functions itself; Python annotations would have no meaning.
# mypy: disable-error-code="no-untyped-def, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

from megatron_hdpo.divergence.triton_terms import LN2, LOG_ZERO, exponent, finish_row


@triton.jit
def _columns(CHUNKS: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr):
    """Return the columns [CHUNKS, THREADS, VECTOR] of a block; a thread holds CHUNKS vectors, one load each."""
    chunk = tl.arange(0, CHUNKS)[:, None, None] * (THREADS * VECTOR)
    return chunk + tl.arange(0, THREADS)[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def _per_thread(x):
    """Sum [CHUNKS, THREADS, VECTOR] to [THREADS]: no thread needs another one's numbers."""
    return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.jit
def _absorb(
    z, begin, cols, state, holes_ptr, k, rate, rate_d, ratio,
    ENTROPY: tl.constexpr, TWO: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Add a block of logits, whose first column is `begin`, to the threads' statistics."""
    ref, total, energy, ref_d, other, rest, slot = state
    higher = tl.maximum(ref, tl.max(tl.max(z, axis=2), axis=0) * rate)
    gap = ref - higher
    shift = tl.exp2(gap)
    x = exponent(z, rate, higher[None, :, None], ENTROPY)
    e = tl.exp2(x)
    if ENTROPY:
        energy = (energy + total * gap) * shift + _per_thread(e * x)
    total = total * shift + _per_thread(e)
    if TWO:
        # The maximum changes nothing, but it keeps the compiler from fusing the product into the difference below,
        # which must see it rounded, as the exponents do.
        higher_d = tl.maximum(ref_d, higher * ratio)
        shift = tl.exp2(ref_d - higher_d)
        e = tl.exp2(exponent(z, rate_d, higher_d[None, :, None], False))
        other = other * shift + _per_thread(e)
        ref_d = higher_d
    if REST:
        hole = tl.load(holes_ptr + slot, mask=slot < k, other=-1)
        while hole >= begin:
            e = tl.where(cols == hole - begin, 0.0, e)
            slot += 1
            hole = tl.load(holes_ptr + slot, mask=slot < k, other=-1)
        rest = rest * shift + _per_thread(e)
    return higher, total, energy, ref_d, other, rest, slot


@triton.jit
def _statistics(
    z_row, holes_ptr, k, valid, rate, rate_d, ratio,
    ENTROPY: tl.constexpr, TWO: tl.constexpr, REST: tl.constexpr,
    CHUNKS: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Return a row's (ref, total, energy, other, rest): total sums e = 2^(z rate - ref), energy e times its exponent.

    other: the sum of 2^(z rate_d - ref ratio). rest: the last one of these sums that there is, without the columns in
    holes_ptr [k], which descend.
    """
    cols = _columns(CHUNKS, THREADS, VECTOR)
    BLOCK: tl.constexpr = CHUNKS * THREADS * VECTOR
    none = tl.zeros([THREADS], tl.float32)
    state = (none + LOG_ZERO, none, none, none + LOG_ZERO, none, none, 0)
    full = valid // BLOCK * BLOCK
    z = tl.load(z_row + full + cols, mask=full + cols < valid, other=-float("inf")).to(tl.float32)
    for begin in range(full, 0, -BLOCK):
        ahead = tl.load(z_row + (begin - BLOCK) + cols).to(tl.float32)
        state = _absorb(z, begin, cols, state, holes_ptr, k, rate, rate_d, ratio, ENTROPY, TWO, REST)
        z = ahead
    state = _absorb(z, 0, cols, state, holes_ptr, k, rate, rate_d, ratio, ENTROPY, TWO, REST)
    ref, total, energy, ref_d, other, rest, _ = state
    top = tl.max(ref, axis=0)
    gap = ref - top
    shift = tl.exp2(gap)
    energy = tl.sum((energy + total * gap) * shift, axis=0) if ENTROPY else 0.0
    total = tl.sum(total * shift, axis=0)
    if TWO:
        shift = tl.exp2(ref_d - tl.max(ref_d, axis=0))
        other = tl.sum(other * shift, axis=0)
    rest = tl.sum(rest * shift, axis=0) if REST else 0.0
    return top, total, energy, other, rest


@triton.jit
def forward_kernel(
    z_ptr, z_stride, ids_ptr, row_ptr, support_ids_ptr, logprobs_ptr, holes_ptr,
    ref_ptr, sum_ptr, energy_ptr, other_ptr, sampled_ptr, support_ptr, rest_ptr,
    entropy_ptr, logprob_ptr, value_ptr, mass_ptr, covered_ptr, top_ptr, grad_ptr, outside_ptr,
    start, valid, rate, rate_d, ratio, b, c, clip, vocab_size, tail_floor, k,
    ENTROPY: tl.constexpr, TWO: tl.constexpr, TARGET: tl.constexpr, REST: tl.constexpr, FINISH: tl.constexpr,
    KIND: tl.constexpr, TAIL: tl.constexpr, CLIP: tl.constexpr, K: tl.constexpr,
    CHUNKS: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Compute a row's statistics over this shard, and the logits at sampled and support ids.

    FINISH: the shard is the whole vocabulary, so the results of finish_kernel are computed as well. rest: the sum over
    the tokens outside the support is made directly (a difference would be rounding noise), along the sorted ids, of
    which a block holds one or two.
    """
    t = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + t * z_stride
    r = tl.load(row_ptr + t).to(tl.int64) if TARGET else t
    count = tl.where(r >= 0, k, 0)
    ref, total, energy, other, rest = _statistics(
        z_row, holes_ptr + r * k, count, valid, rate, rate_d, ratio, ENTROPY, TWO, REST, CHUNKS, THREADS, VECTOR
    )
    local = tl.load(ids_ptr + t) - start
    sampled = tl.load(z_row + local, mask=(local >= 0) & (local < valid), other=0.0).to(tl.float32)
    z_K = 0.0
    if TARGET:
        slots = tl.arange(0, K)
        local_K = tl.load(support_ids_ptr + r * k + slots, mask=slots < count, other=-1) - start
        z_K = tl.load(z_row + local_K, mask=(local_K >= 0) & (local_K < valid), other=0.0).to(tl.float32)
        tl.store(support_ptr + r * k + slots, z_K, mask=slots < count)
    tl.store(ref_ptr + t, ref)
    tl.store(sum_ptr + t, total)
    tl.store(sampled_ptr + t, sampled)
    if TWO:
        tl.store(other_ptr + t, other)
    if FINISH:
        finish_row(
            t, r, ref, total, energy, other, sampled, rest, z_K,
            ids_ptr, support_ids_ptr, logprobs_ptr,
            entropy_ptr, logprob_ptr, value_ptr, mass_ptr, covered_ptr, top_ptr, grad_ptr, outside_ptr,
            rate, rate_d, ratio, b, c, clip, vocab_size, tail_floor, k,
            ENTROPY, TWO, TARGET, KIND, TAIL, CLIP, K,
        )  # fmt: skip
    else:
        if ENTROPY:
            tl.store(energy_ptr + t, energy)
        if REST:
            tl.store(rest_ptr + t, rest)


@triton.jit
def finish_kernel(
    ids_ptr, row_ptr, support_ids_ptr, logprobs_ptr,
    ref_ptr, sum_ptr, energy_ptr, other_ptr, sampled_ptr, support_ptr, rest_ptr,
    entropy_ptr, logprob_ptr, value_ptr, mass_ptr, covered_ptr, top_ptr, grad_ptr, outside_ptr,
    rate, rate_d, ratio, b, c, clip, vocab_size, tail_floor, k,
    ENTROPY: tl.constexpr, TWO: tl.constexpr, TARGET: tl.constexpr, REST: tl.constexpr,
    KIND: tl.constexpr, TAIL: tl.constexpr, CLIP: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Compute log-prob, entropy, divergence and its gradient on the support from the group's sums."""
    t = tl.program_id(0).to(tl.int64)
    r = tl.load(row_ptr + t).to(tl.int64) if TARGET else t
    ref, total = tl.load(ref_ptr + t), tl.load(sum_ptr + t)
    energy = tl.load(energy_ptr + t) if ENTROPY else 0.0
    other = tl.load(other_ptr + t) if TWO else 0.0
    rest = tl.load(rest_ptr + t) if REST else 0.0
    z_K = 0.0
    if TARGET:
        slots = tl.arange(0, K)
        z_K = tl.load(support_ptr + r * k + slots, mask=(slots < k) & (r >= 0), other=0.0)
    finish_row(
        t, r, ref, total, energy, other, tl.load(sampled_ptr + t), rest, z_K,
        ids_ptr, support_ids_ptr, logprobs_ptr,
        entropy_ptr, logprob_ptr, value_ptr, mass_ptr, covered_ptr, top_ptr, grad_ptr, outside_ptr,
        rate, rate_d, ratio, b, c, clip, vocab_size, tail_floor, k,
        ENTROPY, TWO, TARGET, KIND, TAIL, CLIP, K,
    )  # fmt: skip


@triton.jit
def _dense_gradient(
    z, rate, ref, rate_d, ref_d, base, slope, away,
    ENTROPY: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """Compute 2^x (base + slope x) with x = z rate - ref, and with TWO also 2^(z rate_d - ref_d) away."""
    x = exponent(z, rate, ref, ENTROPY)
    g = tl.exp2(x) * (tl.fma(x, slope, base) if ENTROPY else base)
    if TWO:
        g += tl.exp2(exponent(z, rate_d, ref_d, False)) * away
    return g


@triton.jit
def gradient_kernel(
    z_ptr, z_stride, g_ptr, g_stride, ids_ptr, row_ptr, support_ids_ptr, support_ptr,
    gl_ptr, gh_ptr, gd_ptr, ref_ptr, sum_ptr, other_ptr, entropy_ptr, logprob_ptr, sampled_ptr, grad_ptr, outside_ptr,
    start, valid, width, rate, rate_d, ratio, k,
    LOGPROB: tl.constexpr, ENTROPY: tl.constexpr, TARGET: tl.constexpr, TWO: tl.constexpr,
    K: tl.constexpr, CHUNKS: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one row: a multiple of one or two softmaxes, then the special entries. g may be z.

    The special entries are the sampled token and the ids of the support.
    """
    t = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + t * z_stride
    g_row = g_ptr + t * g_stride
    ref, total = tl.load(ref_ptr + t), tl.load(sum_ptr + t)
    log_total = tl.log(total)
    ref_d, total_d = ref, total
    id_t = tl.load(ids_ptr + t)
    gl, scale, slope, away, gd = 0.0, 0.0, 0.0, 0.0, 0.0
    if LOGPROB:
        gl = tl.where(id_t >= 0, tl.load(gl_ptr + t) * (rate * LN2), 0.0)
        scale -= gl
    if ENTROPY:
        slope = -tl.load(gh_ptr + t) * (rate * LN2)
        scale += slope * tl.load(entropy_ptr + t)
    if TARGET:
        r_row = tl.load(row_ptr + t).to(tl.int64)
        gd = tl.load(gd_ptr + t) * (rate_d * LN2)
        away = gd * tl.load(outside_ptr + t)
        if TWO:
            ref_d, total_d = ref * ratio, tl.load(other_ptr + t)
    # The special entries are computed before the row is overwritten, from the logits that the forward gathered.
    at_sampled = 0.0
    if LOGPROB:
        lq_y = tl.load(logprob_ptr + t)
        at_sampled = gl + tl.exp(lq_y) * (scale + slope * lq_y)
        if TARGET:
            x_y = exponent(tl.load(sampled_ptr + t), rate_d, ref_d, False)
            at_sampled += away * (tl.exp2(x_y) / total_d)
    dense = scale
    if TARGET and not TWO:
        dense += away
    # q (dense + slope ln q) with q = 2^x / total.
    base = (dense - slope * log_total) / total
    steep = slope * LN2 / total
    away_d = away / total_d
    cols = _columns(CHUNKS, THREADS, VECTOR)
    BLOCK: tl.constexpr = CHUNKS * THREADS * VECTOR
    full = valid // BLOCK * BLOCK
    for begin in range(0, full, BLOCK):
        z = tl.load(z_row + begin + cols).to(tl.float32)
        g = _dense_gradient(z, rate, ref, rate_d, ref_d, base, steep, away_d, ENTROPY, TWO)
        tl.store(g_row + begin + cols, g.to(g_ptr.dtype.element_ty))
    for begin in range(full, width, BLOCK):  # the end of the vocabulary, and padding, whose gradient is 0
        at = begin + cols
        z = tl.load(z_row + at, mask=at < valid, other=-float("inf")).to(tl.float32)
        g = _dense_gradient(z, rate, ref, rate_d, ref_d, base, steep, away_d, ENTROPY, TWO)
        tl.store(g_row + at, tl.where(at < valid, g, 0.0).to(g_ptr.dtype.element_ty), mask=at < width)
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
        g_K = gd * tl.load(grad_ptr + r_row * k + slots, mask=here, other=0.0)
        if LOGPROB or ENTROPY:
            lq_K = LN2 * exponent(z_K, rate, ref, True) - log_total
            g_K += tl.exp(lq_K) * (scale + slope * lq_K)
        g_K += tl.where(ids == id_t, gl, 0.0)
        local_K = ids - start
        mine_K = (ids >= 0) & (local_K >= 0) & (local_K < valid)
        tl.store(g_row + local_K, g_K.to(g_ptr.dtype.element_ty), mask=mine_K)
