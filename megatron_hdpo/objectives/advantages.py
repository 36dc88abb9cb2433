"""Advantages of the rollouts of one group, computed in float64."""

from __future__ import annotations

from typing import Literal

import numpy as np

AdvantageKind = Literal["leave_one_out", "rloo", "group", "none"]

_MIN_STD = 1e-6
_EQUAL = 1e-12
"""Relative difference of rewards that differ by rounding alone: a score of 0.1 + 0.2 and one of 0.3."""


def advantages(rewards_G: np.ndarray, kind: AdvantageKind = "leave_one_out") -> np.ndarray:
    """Return the advantages, float64 [G], of the rewards [G] of one group.

    leave_one_out: (R_i - mean of the others) / (std of the others + 1e-6), unscaled where that std is below 1e-6
    (HDPO's Algorithm 1 read as in its code base); rloo: without the std; group: (R - mean) / (std + 1e-6) with one
    degree of freedom less (GRPO), 0 for a single rollout; none: the rewards. A group of one, and a group of equal
    rewards, has advantage 0 for every kind but `none`: in floating point the mean of three times 0.1 is not 0.1.
    """
    rewards = np.asarray(rewards_G, dtype=np.float64)
    size = len(rewards)
    if kind == "none":
        return rewards
    if size <= 1 or rewards.max() - rewards.min() <= _EQUAL * abs(rewards).max():
        return np.zeros(size)
    if kind == "group":
        std = rewards.std(ddof=1)
        return (rewards - rewards.mean()) / (std + 1e-6)
    others_mean = (rewards.sum() - rewards) / (size - 1)
    centred = rewards - others_mean
    return centred if kind == "rloo" else _divide_by_others_std(rewards, centred)


def _divide_by_others_std(rewards: np.ndarray, centred: np.ndarray) -> np.ndarray:
    """Return each centred reward divided by the sample std of the other rewards.

    The std is computed from centred values, because E[R^2] - E[R]^2 turns rewards that are equal but not binary into
    noise.
    """
    size = len(rewards)
    if size < 3:
        return centred
    others = np.broadcast_to(rewards, (size, size))[~np.eye(size, dtype=bool)].reshape(size, size - 1)
    std = others.std(axis=1, ddof=1)
    scaled = std >= _MIN_STD
    return np.where(scaled, centred / np.where(scaled, std + 1e-6, 1.0), centred)
