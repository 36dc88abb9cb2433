"""pass@k against enumeration of all subsets; intervals against known values and coverage."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hdpo.evaluation.passk import bootstrap, interval, pass_at_k, wilson


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_equals_the_share_of_subsets_with_a_right_sample(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_equals_the_exact_fraction_for_large_n(case):
    n, c, k = case
    exact = 1 - Fraction(comb(n - c, k), comb(n, k))
    assert pass_at_k(n, c, k) == pytest.approx(float(exact), rel=1e-9, abs=1e-12)


def test_pass_at_one_is_the_mean_and_pass_at_n_is_any():
    assert pass_at_k(8, 3, 1) == pytest.approx(3 / 8)
    assert [pass_at_k(8, c, 8) for c in (0, 1, 8)] == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0), (0, 0, 1)])
def test_impossible_counts_are_refused(n, c, k):
    with pytest.raises(ValueError, match=r"must lie|needs at least"):
        pass_at_k(n, c, k)


def test_pass_at_k_is_unbiased_where_any_of_k_from_reused_samples_is_not():
    rng, p, n, k = random.Random(0), 0.2, 6, 3
    counts = [(n, sum(rng.random() < p for _ in range(n))) for _ in range(20_000)]
    estimate = interval([pass_at_k(*count, k) for count in counts[:2000]])
    truth = 1 - (1 - p) ** k
    assert sum(pass_at_k(*count, k) for count in counts) / len(counts) == pytest.approx(truth, abs=0.01)
    assert estimate.low < truth < estimate.high
    assert estimate.problems == 2000


def test_the_interval_of_outcomes_is_wilsons_and_else_a_bootstrap():
    assert interval([1.0, 0.0, 0.0]) == wilson(1, 3)
    assert interval([0.0] * 24).high == wilson(0, 24).high > 0.1  # a bootstrap would have no width
    assert interval([0.5, 0.25, 1.0]) == bootstrap([0.5, 0.25, 1.0])
    with pytest.raises(ValueError, match="no problems"):
        interval([])


def test_wilson_against_published_values():
    estimate = wilson(81, 263)  # Newcombe 1998, table I: 0.2553 to 0.3662
    assert (round(estimate.low, 4), round(estimate.high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 20).low == 0.0 and round(wilson(0, 20).high, 4) == 0.1611
    assert wilson(20, 20).high == pytest.approx(1.0) and wilson(20, 20).low < 1.0


def test_bootstrap_is_deterministic_and_covers():
    rng, hits = random.Random(1), 0
    for trial in range(200):
        values = [rng.random() for _ in range(40)]
        estimate = bootstrap(values, 0.9, resamples=200, seed=trial)
        hits += estimate.low <= 0.5 <= estimate.high
    assert 165 <= hits <= 195  # 180 expected, standard deviation 4.2
    assert bootstrap([0.0, 1.0, 0.5], seed=3) == bootstrap([0.0, 1.0, 0.5], seed=3)
