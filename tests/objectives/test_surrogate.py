"""The clipped surrogate against a scalar implementation of its definition, gradient included."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_hdpo.objectives.surrogate import clipped_surrogate
from megatron_hdpo.types.learning import SurrogateConfig

CONFIGS = [
    SurrogateConfig(),
    SurrogateConfig(clip_low=0.2, clip_high=0.28),
    SurrogateConfig(clip_low=0.5, clip_high=0.1, dual_clip=3.0),
    SurrogateConfig(dual_clip=1.1),
    SurrogateConfig(importance_cap=2.0),
    SurrogateConfig(clip_high=0.4, dual_clip=1.5, importance_cap=0.9),
]


def by_definition(logprob: float, old: float, rollout: float, advantage: float, c: SurrogateConfig) -> dict[str, float]:
    """Loss, d loss / d logprob (d ratio / d logprob is the ratio), ratio, whether the clip chose, importance."""
    ratio = math.exp(logprob - old)
    clipped_ratio = min(max(ratio, 1 - c.clip_low), 1 + c.clip_high)
    loss, slope = -advantage * ratio, -advantage * ratio
    is_clipped = -advantage * clipped_ratio > loss
    if is_clipped:
        loss, slope = -advantage * clipped_ratio, 0.0
    if c.dual_clip is not None and advantage < 0 and loss > -advantage * c.dual_clip:
        loss, slope = -advantage * c.dual_clip, 0.0
    importance = math.exp(old - rollout)
    if c.importance_cap is not None:
        importance = min(importance, c.importance_cap)
        loss, slope = loss * importance, slope * importance
    return {"loss": loss, "slope": slope, "ratio": ratio, "clipped": is_clipped, "importance": importance}


def compute(tokens: list[tuple[float, float, float, float]], config: SurrogateConfig):
    logprobs, old, rollout, advantage = (torch.tensor(x, dtype=torch.float64) for x in zip(*tokens, strict=True))
    logprobs.requires_grad_()
    result = clipped_surrogate(logprobs, old, rollout, advantage, config)
    result.loss_T.sum().backward()
    return result, logprobs.grad


numbers = st.floats(-4, 0)
tokens = st.tuples(numbers, numbers, numbers, st.sampled_from([-2.0, -0.5, 0.0, 0.7, 1.5]))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@settings(deadline=None)  # of a busy machine
@given(st.lists(tokens, min_size=1, max_size=20))
@example([(-1.0, -1.5, -1.0, 1.0), (-1.0, -1.5, -1.0, -1.0), (-1.5, -1.0, -2.0, 1.0), (-1.5, -1.0, -2.0, -1.0)])
@example([(-0.1, -2.0, -2.0, -1.0), (-0.1, -2.0, -2.0, 1.0)])
def test_value_and_gradient(config: SurrogateConfig, rows: list[tuple[float, float, float, float]]) -> None:
    result, gradient = compute(rows, config)
    for t, row in enumerate(rows):
        expected = by_definition(*row, config)
        found = (result.loss_T[t], gradient[t], result.ratio_T[t], result.importance_T[t])
        names = ("loss", "slope", "ratio", "importance")
        for value, name in zip(found, names, strict=True):
            assert float(value.detach()) == pytest.approx(expected[name], rel=1e-9, abs=1e-12), (name, row)
        assert bool(result.clipped_T[t]) == expected["clipped"]


@pytest.mark.parametrize("config", CONFIGS[:4], ids=str)
def test_one_update_per_step_is_reinforce(config: SurrogateConfig) -> None:
    """At ratio 1 nothing is clipped: the loss is -A, its gradient -A times that of log q."""
    logprobs = torch.tensor([-0.3, -2.0, -7.0], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.5, -0.5, 0.0], dtype=torch.float64)
    result = clipped_surrogate(logprobs, logprobs.detach(), logprobs.detach(), advantages, config)
    result.loss_T.sum().backward()
    torch.testing.assert_close(result.loss_T.detach(), -advantages)
    torch.testing.assert_close(logprobs.grad, -advantages)
    assert not result.clipped_T.any()


def test_importance_is_a_constant() -> None:
    """Its weight multiplies the gradient, but the ratio of trainer to engine is not differentiated."""
    logprobs = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    rollout = torch.tensor([-1.2], dtype=torch.float64, requires_grad=True)
    config = SurrogateConfig(importance_cap=5.0)
    result = clipped_surrogate(logprobs, logprobs.detach(), rollout.detach(), torch.ones(1).double(), config)
    result.loss_T.sum().backward()
    assert float(logprobs.grad) == pytest.approx(-math.exp(0.2))
    assert not result.importance_T.requires_grad and not result.ratio_T.requires_grad


@pytest.mark.parametrize(("advantage", "dual_clip"), [(1.0, None), (1.0, 3.0), (-1.0, 3.0)])
def test_a_ratio_that_overflows_behind_a_clip_has_no_gradient(advantage: float, dual_clip: float | None) -> None:
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    old = torch.tensor([-300.0, -1.0])
    config = SurrogateConfig(dual_clip=dual_clip)
    result = clipped_surrogate(logprobs, old, old, torch.full((2,), advantage), config)
    result.loss_T.sum().backward()
    assert torch.isinf(result.ratio_T[0])
    assert float(result.loss_T[0].detach()) == pytest.approx(-1.2 if advantage > 0 else 3.0)
    assert logprobs.grad.tolist() == [0.0, -advantage]
