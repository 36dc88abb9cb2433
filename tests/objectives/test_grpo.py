"""GRPO's examples and scorings from hand-made groups."""

from __future__ import annotations

import numpy as np
import pytest
from rollout_groups import group, sample

from megatron_hdpo.objectives.base import ObjectiveDeps
from megatron_hdpo.objectives.grpo import GRPO, GRPOConfig
from megatron_hdpo.types.learning import Score

CLIFF, SOLVED, MIXED, EMPTY = [0.0] * 4, [1.0] * 4, [1.0, 0.0, 0.0, 0.0], []


def test_one_example_per_rollout_with_its_advantage_at_every_token() -> None:
    rewards = [sample(1.0, 5), sample(0.0, 2), sample(0.0, 1), sample(0.0, 4)]
    mixed = group(rewards)
    examples = GRPO(GRPOConfig(), ObjectiveDeps(1.0)).examples([mixed], {})
    assert len(examples) == 4
    for example, rollout, advantage in zip(examples, rewards, [1.0, -0.577349, -0.577349, -0.577349], strict=True):
        length = rollout.length
        np.testing.assert_array_equal(example.prompt_ids, [7, 1, 2])
        np.testing.assert_array_equal(example.response_ids, rollout.completion.token_ids)
        np.testing.assert_allclose(example.advantages_T, [advantage] * length, atol=1e-6)
        np.testing.assert_array_equal(example.surrogate_weights_T, np.ones(length))
        assert example.surrogate_count == length
        np.testing.assert_array_equal(example.rollout_logprobs_T, rollout.completion.logprobs)
        assert example.old_logprobs_T is None and example.target is None and example.distill_count == 0.0
        assert not example.inert


@pytest.mark.parametrize("rewards", [CLIFF, SOLVED])
def test_groups_without_contrast_count_and_are_inert(rewards: list[float]) -> None:
    examples = GRPO(GRPOConfig(), ObjectiveDeps(1.0)).examples([group(rewards)], {})
    assert all(example.inert for example in examples)
    assert sum(example.surrogate_count for example in examples) == 12  # four responses of three tokens


def test_an_empty_group_gives_nothing() -> None:
    objective = GRPO(GRPOConfig(), ObjectiveDeps(1.0, 2))
    assert objective.examples([group(EMPTY)], {}) == []
    assert objective.scorings([group(EMPTY)]) == []
    assert objective.metrics([group(EMPTY)]) == {}


def test_groups_do_not_see_each_other() -> None:
    first, second = group(MIXED), group([1.0, 1.0, 0.0])
    objective = GRPO(GRPOConfig(), ObjectiveDeps(1.0))
    together = [e.advantages_T[0] for e in objective.examples([first, second], {})]
    alone = [e.advantages_T[0] for g in (first, second) for e in objective.examples([g], {})]
    assert together == alone


def _cut_group():
    return group([sample(1.0, 2), sample(0.0, 6, cut=True), sample(0.0, 3), sample(1.0, 4, cut=True)])


def test_overlong_keep() -> None:
    examples = GRPO(GRPOConfig(overlong="keep"), ObjectiveDeps(1.0)).examples([_cut_group()], {})
    assert [e.surrogate_count for e in examples] == [2, 6, 3, 4]
    assert all((e.surrogate_weights_T == 1).all() for e in examples)
    np.testing.assert_allclose([e.advantages_T[0] for e in examples], np.array([1, -1, -1, 1]) * 1.154699, atol=1e-6)


def test_overlong_mask() -> None:
    """A cut response has no token in the loss or in the count; its reward is part of the others' baseline still."""
    examples = GRPO(GRPOConfig(overlong="mask"), ObjectiveDeps(1.0)).examples([_cut_group()], {})
    assert [e.surrogate_count for e in examples] == [2, 0, 3, 0]
    assert [bool(e.surrogate_weights_T.any()) for e in examples] == [True, False, True, False]
    assert [e.inert for e in examples] == [False, True, False, True]
    np.testing.assert_allclose(examples[0].advantages_T, [1.154699] * 2, atol=1e-6)


def test_overlong_penalise() -> None:
    config = GRPOConfig(overlong="penalise", overlong_penalty=0.4, advantage="rloo")
    examples = GRPO(config, ObjectiveDeps(1.0)).examples([_cut_group()], {})
    rewards = np.array([1.0, -0.4, 0.0, 0.6])
    expected = [r - (rewards.sum() - r) / 3 for r in rewards]
    np.testing.assert_allclose([e.advantages_T[0] for e in examples], expected, atol=1e-6)
    assert [e.surrogate_count for e in examples] == [2, 6, 3, 4]


@pytest.mark.parametrize(("kind", "success"), [("rloo", 1.0), ("group", 1.499997), ("none", 1.0)])
def test_the_kind_of_advantage_is_the_recipes(kind: str, success: float) -> None:
    examples = GRPO(GRPOConfig(advantage=kind), ObjectiveDeps(1.0)).examples([group(MIXED)], {})
    assert examples[0].advantages_T[0] == pytest.approx(success, abs=1e-6)


def test_old_logprobs_are_asked_for_when_the_policy_moves_within_a_step() -> None:
    groups = [group(MIXED[:2], prompt=5), group(SOLVED[:1], prompt=6)]
    assert GRPO(GRPOConfig(), ObjectiveDeps(0.7, 1)).scorings(groups) == []
    objective = GRPO(GRPOConfig(), ObjectiveDeps(0.7, 2))
    scorings = objective.scorings(groups)
    assert [s.key for s in scorings] == [(0, "student", 0, "old"), (0, "student", 1, "old"), (1, "student", 0, "old")]
    assert {(s.role, s.temperature, s.top_k) for s in scorings} == {("policy", 0.7, 0)}
    for scoring in scorings:
        source = groups[scoring.key[0]]
        np.testing.assert_array_equal(scoring.context_ids, source.prompt_ids)
        np.testing.assert_array_equal(scoring.response_ids, source.samples[scoring.key[2]].completion.token_ids)
    scores = {s.key: Score(np.full(3, -float(i), dtype=np.float32), np.zeros(3)) for i, s in enumerate(scorings)}
    examples = objective.examples(groups, scores)
    assert [e.old_logprobs_T.tolist() for e in examples] == [[0.0] * 3, [-1.0] * 3, [-2.0] * 3]


def test_shares_of_groups() -> None:
    metrics = GRPO(GRPOConfig(), ObjectiveDeps(1.0)).metrics(
        [group(CLIFF), group(SOLVED), group(MIXED), group(EMPTY), group(MIXED)]
    )
    assert metrics == pytest.approx(
        {"rollout/solved_rate": 0.25, "rollout/cliff_rate": 0.25, "rollout/mixed_rate": 0.5}
    )


def test_no_privileged_rollouts() -> None:
    objective = GRPO(GRPOConfig(), ObjectiveDeps(1.0))
    assert objective.privileged_rollouts_for(group(CLIFF), 0) == 0
    assert objective.loss.distill is None and objective.loss.temperature == 1.0


def test_a_mean_over_sequences() -> None:
    examples = GRPO(GRPOConfig(aggregation="sequence", overlong="mask"), ObjectiveDeps(1.0)).examples(
        [_cut_group()], {}
    )
    assert [e.surrogate_count for e in examples] == [1, 0, 1, 0]
    assert [float(e.surrogate_weights_T.sum()) for e in examples] == pytest.approx([1, 0, 1, 0])


@pytest.mark.parametrize(
    ("samples", "overlong", "signal"),
    [
        (CLIFF, "keep", False),
        (SOLVED, "keep", False),
        (MIXED, "keep", True),
        (EMPTY, "keep", False),
        ([1.0], "keep", False),
        ([sample(1.0, cut=True), sample(0.0, cut=True)], "keep", True),
        ([sample(1.0, cut=True), sample(0.0, cut=True)], "mask", False),
        ([sample(1.0, cut=True), sample(0.0)], "mask", True),
        ([sample(0.0, cut=True), sample(0.0)], "penalise", False),
        ([sample(0.5, cut=True), sample(0.5)], "penalise", True),
        ([sample(1.0, 0), sample(0.0, 0)], "keep", False),
    ],
)
def test_signal_is_an_advantage_that_is_trained_on(samples: list, overlong: str, signal: bool) -> None:
    """Dynamic sampling replaces groups without it; a KL penalty alone is none."""
    objective = GRPO(GRPOConfig.model_validate({"overlong": overlong, "kl": {"coefficient": 0.1}}), ObjectiveDeps(1.0))
    assert objective.has_signal(group(samples)) is signal


def test_a_penalty_keeps_groups_without_contrast_alive() -> None:
    objective = GRPO(GRPOConfig.model_validate({"kl": {"coefficient": 0.1}, "overlong": "mask"}), ObjectiveDeps(0.9))
    groups = [group([sample(0.0, 2), sample(0.0, 3, cut=True)])]
    (scoring,) = objective.scorings(groups)
    assert (scoring.key, scoring.role, scoring.temperature) == ((0, "student", 0, "reference"), "reference", 0.9)
    reference = np.array([-1.0, -2.0], dtype=np.float32)
    alive, masked = objective.examples(groups, {scoring.key: Score(reference, np.zeros(2))})
    assert not alive.inert and masked.inert and masked.reference_logprobs_T is None
    np.testing.assert_array_equal(alive.reference_logprobs_T, reference)
    assert objective.loss.kl_coefficient == 0.1 and objective.config.needs_reference
