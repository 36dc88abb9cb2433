"""The sampling mathematics against exact distributions and against a slow, plain float64 reference."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_hdpo.rollout.token_sampling import inverse_cdf, row_params, sample, truncate, uniforms

CPU = torch.device("cpu")
FIRST_OF_7_3 = [0.4821286018761155, 0.7241355726248441, 0.05025403948627161]


def reference_kept(weights: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """bool [V], one token after the other: most likely first, ties by lower id, k of them, until mass p is reached."""
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))[:top_k]
    total, mass = sum(float(weights[i]) for i in order), 0.0
    kept = np.zeros(len(weights), dtype=bool)
    for index in order:
        if top_p < 1 and mass >= top_p * total:
            break
        kept[index] = True
        mass += float(weights[index])
    return kept


def truncated(weights: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    rows = weights.shape[0]
    return truncate(
        weights, weights.double().sum(-1), torch.full((rows,), top_k), torch.full((rows,), top_p, dtype=torch.float64)
    )


# ---- uniforms


def test_uniforms_are_a_pure_function_with_independent_streams():
    # Fixed for ever: saved seeds must go on meaning the same samples.
    np.testing.assert_allclose(uniforms(7, 3, 3).ravel()[:3], FIRST_OF_7_3, rtol=0, atol=1e-15)
    np.testing.assert_array_equal(uniforms(7, 3, 1000)[:10], uniforms(7, 3, 10))
    pairs = np.stack([uniforms(seed, index, 2000) for seed in (0, 1, 2**64 - 1) for index in (0, 1)])
    streams = pairs.transpose(0, 2, 1).reshape(12, 2000)
    assert streams.min() >= 0 and streams.max() < 1
    correlations = np.corrcoef(streams) - np.eye(len(streams))
    assert np.abs(correlations).max() < 0.1  # 4.5 standard errors
    np.testing.assert_allclose(streams.mean(), 0.5, atol=0.01)


# ---- inverse CDF


@given(
    weights=st.lists(st.sampled_from([0.0, 0.0, 1.0, 2.0, 0.25]), min_size=1, max_size=400).filter(any),
    u=st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)),
)
@example(weights=[0.0, 1.0, 0.0], u=(0.0, 1 - 2**-53))
@example(weights=[1.0, 0.0], u=(1 - 2**-53, 1 - 2**-53))
@example(weights=[0.0, 1.0], u=(0.0, 0.0))
@example(weights=[0.0] * 128 + [1.0] * 128 + [0.0] * 128, u=(1 - 2**-53, 0.0))
@settings(max_examples=200, deadline=None)
def test_inverse_cdf_takes_the_first_block_and_then_the_first_id_beyond_u(weights, u):
    # These weights and their sums are exact in floating point, so the reference admits one answer.
    blocks = [weights[start : start + 128] for start in range(0, len(weights), 128)]
    block = first_beyond([sum(b) for b in blocks], u[0])
    (drawn,) = inverse_cdf(torch.tensor([weights]), torch.tensor([u], dtype=torch.float64)).tolist()
    assert drawn == 128 * block + first_beyond(blocks[block], u[1]) and weights[drawn] > 0


def first_beyond(weights: list[float], u: float) -> int:
    cdf = np.cumsum(np.array(weights))
    return int(np.searchsorted(cdf, u * cdf[-1], side="right"))


def test_a_draw_survives_rounding_errors_of_the_logits():
    """Among 50,000 nearly equal tokens one search over all cumulative sums loses over a draw in a thousand here."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 50_000, generator=generator)
    u = torch.from_numpy(uniforms(0, 0, 400))
    params = row_params([1.0] * 400, [None] * 400, [1.0] * 400, 50_000, CPU)
    exact = sample(logits.expand(400, -1), u, params).ids_B
    moved = sample((logits + 2e-5 * torch.randn(1, 50_000, generator=generator)).expand(400, -1), u, params).ids_B
    assert (exact == moved).all() and len(set(exact.tolist())) > 390


def test_inverse_cdf_never_returns_an_id_of_weight_zero_on_a_large_vocabulary():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(64, 49_157, generator=generator) * (torch.rand(64, 49_157, generator=generator) < 0.01)
    for u in (0.0, 1 - 2**-53, 0.5):
        drawn = inverse_cdf(weights, torch.full((64, 2), u, dtype=torch.float64))
        assert (weights.gather(1, drawn[:, None]) > 0).all()


def chi_square(logits: torch.Tensor, settings_: dict, draws: int = 40_000) -> tuple[float, int]:
    """Statistic and degrees of freedom of `draws` samples against the exact truncated softmax, in float64."""
    vocab = len(logits)
    temperature, top_k, top_p = settings_.get("t", 1.0), settings_.get("k"), settings_.get("p", 1.0)
    params = row_params([temperature] * draws, [top_k] * draws, [top_p] * draws, vocab, CPU)
    u = torch.from_numpy(np.concatenate([uniforms(11, index, 100) for index in range(draws // 100)]))
    counts = np.bincount(sample(logits.expand(draws, -1), u, params).ids_B.numpy(), minlength=vocab)
    probs = torch.softmax(logits.double() / temperature, -1).numpy()
    probs = probs * reference_kept(probs, top_k or vocab, top_p)
    probs /= probs.sum()
    assert (counts[probs == 0] == 0).all()
    expected = draws * probs[probs > 0]
    return float(((counts[probs > 0] - expected) ** 2 / expected).sum()), int((probs > 0).sum()) - 1


@pytest.mark.parametrize(
    "settings_", [{}, {"t": 0.6}, {"t": 1.7}, {"k": 50}, {"p": 0.7}, {"t": 1.3, "k": 90, "p": 0.8}]
)
def test_draws_follow_the_exact_distribution(settings_):
    logits = torch.randn(300, generator=torch.Generator().manual_seed(1)) * 1.2
    statistic, freedom = chi_square(logits, settings_)
    assert freedom >= 20
    # Mean f, variance 2f: beyond 4 standard deviations lies less than one run in a thousand; the draws are fixed.
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)


def test_the_chi_square_test_would_notice_a_slightly_wrong_temperature():
    logits = torch.randn(300, generator=torch.Generator().manual_seed(1)) * 1.2
    wrong, freedom = chi_square(logits * 1.05, {})
    right = torch.softmax(logits.double(), -1)
    assert wrong < freedom + 4 * np.sqrt(2 * freedom)  # right for its own logits
    draws = 40_000
    u = torch.from_numpy(np.concatenate([uniforms(11, index, 100) for index in range(draws // 100)]))
    params = row_params([1.0] * draws, [None] * draws, [1.0] * draws, 300, CPU)
    counts = torch.bincount(sample((logits * 1.05).expand(draws, -1), u, params).ids_B, minlength=300)
    assert float(((counts - draws * right) ** 2 / (draws * right)).sum()) > freedom + 4 * np.sqrt(2 * freedom)


# ---- truncation


@given(
    weights=st.lists(st.integers(0, 6), min_size=1, max_size=60).filter(any),
    top_k=st.integers(1, 70),
    top_p=st.sampled_from([0.125, 0.25, 0.5, 0.75, 0.9375, 1.0]),
)
@settings(max_examples=300, deadline=None)
def test_truncation_equals_the_plain_reference_ties_included(weights, top_k, top_p):
    # Small integers: full of ties, and exact sums.
    weights_BV = torch.tensor([weights], dtype=torch.float32)
    kept = reference_kept(np.array(weights, dtype=np.float64), min(top_k, len(weights)), top_p)
    result = truncated(weights_BV, min(top_k, len(weights)), top_p)
    np.testing.assert_array_equal(result[0].numpy(), np.where(kept, weights, 0))


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.999])
def test_top_p_beyond_the_first_candidates(top_p):
    """A nearly flat row needs thousands of tokens, a steep row a few: both in one call."""
    flat = 1 + torch.randperm(9000, generator=torch.Generator().manual_seed(0)).float() / 2**14
    steep = torch.exp(-torch.arange(9000.0) / 3)
    weights_BV = torch.stack([flat, steep])
    result_BV = truncated(weights_BV, 9000, top_p)
    for weights, result in zip(weights_BV, result_BV, strict=True):
        np.testing.assert_array_equal(result.numpy() > 0, reference_kept(weights.double().numpy(), 9000, top_p))


def test_rows_are_truncated_each_by_its_own_limits():
    weights_BV = torch.tensor([[4.0, 3, 2, 1]]).repeat(4, 1)
    ks, ps = torch.tensor([4, 2, 4, 3]), torch.tensor([1.0, 1.0, 0.5, 0.1], dtype=torch.float64)
    result = truncate(weights_BV, weights_BV.double().sum(-1), ks, ps)
    assert result.tolist() == [[4, 3, 2, 1], [4, 3, 0, 0], [4, 3, 0, 0], [4, 0, 0, 0]]


def test_top_p_is_of_what_top_k_left():
    # 0.6 of the whole needs 4 + 3 of 10; 0.6 of the two left by top-k, 7, needs 4 + 3 as well; 0.55 needs only the 4.
    weights_BV = torch.tensor([[4.0, 3, 2, 1]])
    assert truncated(weights_BV, 2, 0.6).tolist() == [[4, 3, 0, 0]]
    assert truncated(weights_BV, 2, 0.55).tolist() == [[4, 0, 0, 0]]
    assert truncated(weights_BV, 4, 0.55).tolist() == [[4, 3, 0, 0]]


# ---- whole step


@given(seed=st.integers(0, 2**31), vocab=st.integers(2, 300), scale=st.sampled_from([0.1, 3.0, 40.0]))
@settings(max_examples=60, deadline=None)
def test_logprobs_are_of_the_full_vocabulary_at_the_rows_temperature(seed, vocab, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, vocab, generator=generator) * scale
    temperatures = [1.0, 0.3, 2.0, 0.0, 1.0]
    params = row_params(temperatures, [None, 2, None, None, 1], [1.0, 0.9, 0.4, 1.0, 1.0], vocab, CPU)
    u = torch.rand(5, 2, dtype=torch.float64, generator=generator)
    untouched = logits.clone()
    draw = sample(logits, u, params, top_logprobs=min(4, vocab))
    scales = torch.tensor([t or 1.0 for t in temperatures], dtype=torch.float64)
    reference = torch.log_softmax(logits.double() / scales[:, None], -1)
    assert torch.equal(logits, untouched)
    tolerance = dict(rtol=0, atol=3e-5 * max(1.0, scale))
    torch.testing.assert_close(draw.logprobs_B.double(), reference.gather(1, draw.ids_B[:, None])[:, 0], **tolerance)
    torch.testing.assert_close(draw.top_logprobs_BK.double(), reference.gather(1, draw.top_ids_BK), **tolerance)
    torch.testing.assert_close(draw.top_logprobs_BK.double(), reference.topk(min(4, vocab)).values, **tolerance)
    assert draw.ids_B[3] == logits[3].argmax() and draw.ids_B[4] == logits[4].argmax()


def test_a_row_does_not_depend_on_the_rows_beside_it():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(30, 1000, generator=generator) * 2
    u = torch.rand(30, 2, dtype=torch.float64, generator=generator)
    temperatures = [0.5 + 0.05 * i for i in range(30)]
    ks = [None if i % 3 else 400 - i for i in range(30)]
    ps = [1.0 if i % 2 else 0.9 for i in range(30)]
    together = sample(logits, u, row_params(temperatures, ks, ps, 1000, CPU))
    for i in range(30):
        alone = sample(logits[i : i + 1], u[i : i + 1], row_params([temperatures[i]], [ks[i]], [ps[i]], 1000, CPU))
        assert alone.ids_B[0] == together.ids_B[i]
        assert alone.logprobs_B[0] == together.logprobs_B[i]


def test_rows_that_are_no_distribution_are_named_and_spoil_no_other():
    logits = torch.zeros(4, 10)
    logits[1, 3], logits[2, 5] = float("nan"), float("inf")
    logits[3, 1:] = -float("inf")
    params = row_params([1.0] * 4, [None, 3, 3, None], [0.9] * 4, 10, CPU)
    draw = sample(logits, torch.full((4, 2), 0.5, dtype=torch.float64), params)
    assert draw.finite_B.tolist() == [True, False, False, True]
    assert draw.ids_B[0] == 4 and draw.ids_B[3] == 0 and draw.logprobs_B[3] == 0


def test_bfloat16_logits_are_computed_in_float32():
    logits = torch.randn(8, 500, generator=torch.Generator().manual_seed(0)).bfloat16()
    params = row_params([0.7] * 8, [None] * 8, [1.0] * 8, 500, CPU)
    draw = sample(logits, torch.rand(8, 2, dtype=torch.float64), params)
    reference = torch.log_softmax(logits.double() / 0.7, -1).gather(1, draw.ids_B[:, None])[:, 0]
    torch.testing.assert_close(draw.logprobs_B.double(), reference, rtol=0, atol=1e-5)
