"""Means of a step's updates: over everything that they counted, not over the updates."""

from __future__ import annotations

import math
import pickle
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hdpo.types.metrics import mean_over, reduce_metrics

updates = st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 50)), min_size=1, max_size=5)


@given(updates)
def test_updates_of_unequal_size_give_the_mean_over_all_tokens(parts: list[tuple[int, int]]) -> None:
    found = reduce_metrics([{"train/entropy": mean_over(total, count)} for total, count in parts])
    expected = Fraction(sum(total for total, _ in parts), sum(count for _, count in parts))
    assert found["train/entropy"] == pytest.approx(float(expected), rel=1e-12, abs=1e-12)


def test_an_update_without_the_metric_does_not_count() -> None:
    assert reduce_metrics([{"a": mean_over(4, 2)}, {}, {"a": mean_over(1, 8)}])["a"] == pytest.approx(0.5)


def test_a_weight_survives_the_way_to_another_rank() -> None:
    sent = pickle.loads(pickle.dumps(mean_over(math.pi, 3)))
    assert (float(sent), sent.weight, sent.reduction) == (math.pi / 3, 3, "mean")
