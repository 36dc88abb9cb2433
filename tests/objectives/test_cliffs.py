"""Cliffs: one definition for all methods, by rewards before penalties, and no surrogate on them."""

from __future__ import annotations

import numpy as np
import pytest
from hint_prompts import StubPrompts
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_groups import group, sample

from megatron_hdpo.objectives.base import ObjectiveDeps
from megatron_hdpo.objectives.grpo import GRPO, GRPOConfig
from megatron_hdpo.objectives.hdpo import HDPO, HDPOConfig
from megatron_hdpo.objectives.registry import OBJECTIVES, build_objective
from megatron_hdpo.objectives.settings import ObjectiveSettings
from megatron_hdpo.types.rollouts import Group

FAMILY = [config for config in OBJECTIVES if issubclass(config, GRPOConfig)]
outcomes = st.lists(st.tuples(st.sampled_from([0.0, 0.2, 0.5, 1.0]), st.booleans()), max_size=6)
failures = st.lists(st.tuples(st.just(0.0), st.booleans()), min_size=1, max_size=6)


def made(outcome: list[tuple[float, bool]]) -> Group:
    return group([sample(reward, cut=cut) for reward, cut in outcome])


def objective_of(config: type[ObjectiveSettings], **keys: object):
    return build_objective(config.model_validate(keys), ObjectiveDeps(1.0, 1, StubPrompts()))


def test_fractional_rewards_make_no_cliff() -> None:
    """GRPO has advantages there; a second try would put both losses on one prompt."""
    objective, prompt = HDPO(HDPOConfig(), ObjectiveDeps()), group([0.5, 0.0, 0.0, 0.2])
    assert not objective.is_cliff(prompt) and objective.privileged_rollouts_for(prompt, 0) == 0
    rewards, values = np.array([0.5, 0.0, 0.0, 0.2]), [e.advantages_T[0] for e in objective.examples([prompt], {})]
    for i, value in enumerate(values):
        others = np.delete(rewards, i)
        assert value == pytest.approx((rewards[i] - others.mean()) / (others.std(ddof=1) + 1e-6), rel=1e-5)


@pytest.mark.parametrize("config", FAMILY)
def test_a_penalty_gives_a_cliff_no_advantages(config: type[GRPOConfig]) -> None:
    cliff = group([sample(0.0, cut=True), sample(0.0), sample(0.0), sample(0.0)])
    objective = objective_of(config, overlong="penalise")
    assert isinstance(objective, GRPO) and not objective.has_signal(cliff)
    assert all(example.inert for example in objective.examples([cliff], {}, {"srpo/weight": 1, "srpo/tokens": 1}))


@settings(deadline=None)
@given(st.lists(outcomes | failures, min_size=1, max_size=4), st.sampled_from(["keep", "mask", "penalise"]))
def test_no_prompt_has_both_losses(prompts: list[list[tuple[float, bool]]], overlong: str) -> None:
    objective = objective_of(HDPOConfig, overlong=overlong)
    for outcome in prompts:
        one = made(outcome)
        taught = objective.privileged_rollouts_for(one, 0) > 0
        assert taught == (len(outcome) > 0 and sum(reward for reward, _ in outcome) == 0)
        assert not (taught and any(example.advantages_T.any() for example in objective.examples([one], {})))


@settings(deadline=None)
@given(st.lists(outcomes | failures, min_size=1, max_size=5), st.sampled_from([0.0, 0.2]))
def test_every_method_counts_the_same_cliffs(prompts: list[list[tuple[float, bool]]], threshold: float) -> None:
    groups = [made(outcome) for outcome in prompts]
    judged = [[reward for reward, _ in outcome] for outcome in prompts if outcome]
    cliffs = sum(max(rewards) <= threshold for rewards in judged)
    solved = sum(min(rewards) >= 1.0 for rewards in judged)
    expected = {"cliff": cliffs, "solved": solved, "mixed": len(judged) - cliffs - solved}
    for config in OBJECTIVES:
        objective = objective_of(config, cliff_threshold=threshold)
        metrics = objective.metrics(groups, objective.counts(groups))
        shares = {name: metrics.get(f"rollout/{name}_rate") for name in expected}
        assert shares == {name: count / len(judged) if judged else None for name, count in expected.items()}, config
