"""Advantages: numbers worked out by hand for common groups, and what must hold for any."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hdpo.objectives.advantages import advantages

# (successes, group size): (advantage of a success, of a failure) for each kind.
TABLE = {
    (2, 4): {"leave_one_out": (1.154699, -1.154699), "rloo": (0.666667, -0.666667), "group": (0.866024, -0.866024)},
    (1, 4): {"leave_one_out": (1.0, -0.577349), "rloo": (1.0, -0.333333), "group": (1.499997, -0.499999)},
    (3, 4): {"leave_one_out": (0.577349, -1.0), "rloo": (0.333333, -1.0), "group": (0.499999, -1.499997)},
    (5, 16): {"leave_one_out": (1.602078, -0.683129), "rloo": (0.733333, -0.333333), "group": (1.436138, -0.652790)},
    (1, 16): {"leave_one_out": (1.0, -0.258198), "rloo": (1.0, -0.066667), "group": (3.749985, -0.249999)},
    (0, 8): {kind: (0.0, 0.0) for kind in ("leave_one_out", "rloo", "group")},
    (8, 8): {kind: (0.0, 0.0) for kind in ("leave_one_out", "rloo", "group")},
}
KINDS = ("leave_one_out", "rloo", "group")
rewards_lists = st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0, -0.5]), min_size=1, max_size=12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("right", "size"), TABLE)
def test_binary_rewards(right: int, size: int, kind: str) -> None:
    rewards = np.array([1.0] * right + [0.0] * (size - right))
    success, failure = TABLE[right, size][kind]
    expected = [success] * right + [failure] * (size - right)
    np.testing.assert_allclose(advantages(rewards, kind), expected, atol=1e-6)


def test_none_gives_the_rewards() -> None:
    np.testing.assert_array_equal(advantages(np.array([0.25, 1.0, 1.0]), "none"), [0.25, 1.0, 1.0])
    np.testing.assert_array_equal(advantages(np.array([0.25]), "none"), [0.25])


def test_leave_one_out_is_the_default() -> None:
    rewards = np.array([1.0, 0.0, 0.0, 1.0, 0.5])
    np.testing.assert_array_equal(advantages(rewards), advantages(rewards, "leave_one_out"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("reward", "size"), [(0.1, 3), (0.7, 3), (0.2, 7), (0.3, 12), (-0.1, 3), (1e-9, 3)])
def test_equal_fractional_rewards_are_no_signal(reward: float, size: int, kind: str) -> None:
    assert not advantages(np.full(size, reward), kind).any()
    assert advantages(np.array([reward] * size + [2 * reward]), kind).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rewards_that_differ_by_rounding_are_equal(kind: str) -> None:
    assert not advantages(np.array([0.3, 0.1 + 0.2, 0.3]), kind).any()


@settings(deadline=None)
@given(rewards_lists, st.sampled_from(KINDS))
def test_definitions(rewards: list[float], kind: str) -> None:
    """One rollout at a time, with the standard library's statistics, in exact fractions of the decimals given."""
    expected = []
    for i, reward in enumerate(rewards):
        others = rewards[:i] + rewards[i + 1 :]
        if not others:
            expected.append(0.0)
        elif kind == "group":
            expected.append((reward - statistics.fmean(rewards)) / (statistics.stdev(rewards) + 1e-6))
        else:
            std = statistics.stdev(others) if kind == "leave_one_out" and len(others) > 1 else 0.0
            expected.append((reward - statistics.fmean(others)) / (1.0 if std < 1e-6 else std + 1e-6))
    np.testing.assert_allclose(advantages(np.array(rewards), kind), expected, rtol=1e-9, atol=1e-9)


@settings(deadline=None)
@given(rewards_lists, st.sampled_from((*KINDS, "none")), st.randoms())
def test_order_does_not_matter(rewards: list[float], kind: str, random) -> None:
    order = list(range(len(rewards)))
    random.shuffle(order)
    shuffled = advantages(np.array(rewards)[order], kind)
    np.testing.assert_allclose(shuffled, advantages(np.array(rewards), kind)[order], atol=1e-9)


@settings(deadline=None)
@given(rewards_lists, st.sampled_from(KINDS), st.floats(-3, 3))
def test_a_constant_added_to_all_rewards_changes_nothing(rewards: list[float], kind: str, shift: float) -> None:
    moved = advantages(np.array(rewards) + shift, kind)
    np.testing.assert_allclose(moved, advantages(np.array(rewards), kind), atol=1e-6)


@settings(deadline=None)
@given(st.floats(-2, 2), st.integers(1, 9), st.sampled_from(KINDS))
def test_equal_rewards_give_no_signal(reward: float, size: int, kind: str) -> None:
    np.testing.assert_allclose(advantages(np.full(size, reward), kind), 0.0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_no_rollout_and_one_rollout(kind: str) -> None:
    assert advantages(np.array([]), kind).shape == (0,)
    np.testing.assert_array_equal(advantages(np.array([0.7]), kind), [0.0])


def test_two_rollouts_have_no_std_of_others() -> None:
    for kind in ("leave_one_out", "rloo"):
        np.testing.assert_allclose(advantages(np.array([1.0, 0.25]), kind), [0.75, -0.75])
    np.testing.assert_allclose(
        advantages(np.array([1.0, 0.25]), "group"), np.array([0.375, -0.375]) / (0.75 / 2**0.5 + 1e-6)
    )


def test_equal_rewards_of_the_others_are_no_noise() -> None:
    """The std of seven times 0.3 is 0, but E[R^2] - E[R]^2 is not, in float32: it would scale 0.7 to thousands."""
    rewards = np.array([1.0] + [0.3] * 7)
    result = advantages(rewards.astype(np.float32))
    assert result[0] == pytest.approx(0.7, abs=1e-6)
    others = np.array([1.0] + [0.3] * 6)
    assert result[1] == pytest.approx((0.3 - others.mean()) / (others.std(ddof=1) + 1e-6), abs=1e-6)
