"""HDPO: which groups get a second try, which of its rollouts teach, and what the trainer is given."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hint_prompts import StubPrompts
from rollout_groups import group, sample, top

from megatron_hdpo.data.leakage import LeakageConfig
from megatron_hdpo.objectives.base import ObjectiveDeps
from megatron_hdpo.objectives.hdpo import HDPO, HDPOConfig
from megatron_hdpo.objectives.settings import RecipeContext
from megatron_hdpo.types.learning import Score

CLIFF, SOLVED, MIXED = [0.0] * 3, [1.0] * 3, [1.0, 0.0, 0.0]


def hdpo(updates_per_step: int = 1, leakage: LeakageConfig | None = None, markers=(), **settings) -> HDPO:
    config = HDPOConfig.model_validate({"name": "hdpo", **settings})
    deps = ObjectiveDeps(1.0, updates_per_step, StubPrompts(markers), leakage or LeakageConfig())
    return HDPO(config, deps)


def test_cliffs_get_a_second_try() -> None:
    groups = [group(MIXED), group(CLIFF), group(SOLVED), group([]), group(CLIFF), group([0.5, 0.9])]
    objective = hdpo(privileged={"rollouts": 5})
    assert [objective.privileged_rollouts_for(group, 0) for group in groups] == [0, 5, 0, 0, 5, 0]


def test_the_cliff_threshold_says_what_a_cliff_is() -> None:
    groups = [group([0.5, 0.0, 0.0, 0.2]), group([0.2, 0.2]), group([0.0, 0.1]), group([0.0, 0.0])]
    for settings, taught in (({}, [0, 0, 0, 8]), ({"cliff_threshold": 0.2}, [0, 8, 8, 8])):
        objective = hdpo(privileged={"success_threshold": 0.5}, **settings)
        assert [objective.privileged_rollouts_for(group, 0) for group in groups] == taught


def test_a_cliff_that_may_hold_right_rollouts_is_refused() -> None:
    config = HDPOConfig.model_validate({"cliff_threshold": 0.5, "privileged": {"success_threshold": 0.5}})
    (error,) = config.errors(RecipeContext(vocab_size=100, teacher="policy", temperature=1.0))
    assert error.startswith("cliff_threshold: 0.5 is no less than privileged.success_threshold=0.5")


def test_without_a_weight_there_is_no_second_try() -> None:
    assert hdpo(distill={"coefficient": 0.0}).privileged_rollouts_for(group(CLIFF), 0) == 0


def test_right_distinct_honest_rollouts_are_kept() -> None:
    right, other = sample(1.0, token_ids=[1, 2, 3]), sample(1.0, token_ids=[1, 2])
    again = sample(1.0, token_ids=[1, 2, 3])
    wrong, leaked = sample(0.0), sample(1.0, text="As given, the answer is 4")
    quoting = sample(1.0, text="see <reference> above: 4")
    cliff = group(CLIFF, [right, wrong, leaked, again, other, quoting, sample(0.5)])
    cliff.dropped = {"wrong": 2, "generation_failed": 1}
    kept = hdpo(markers=["<reference>"]).keep_privileged(cliff)
    assert kept.privileged_samples == [right, other]
    assert kept.dropped == {"wrong": 4, "leaked": 2, "duplicate": 1, "generation_failed": 1}


def test_filters_can_be_turned_off() -> None:
    rollouts = [sample(1.0, token_ids=[1, 2]), sample(1.0, token_ids=[1, 2]), sample(1.0, text="As given, 4")]
    objective = hdpo(leakage=LeakageConfig(enabled=False), privileged={"drop_duplicates": False})
    assert objective.keep_privileged(group(CLIFF, rollouts)).privileged_samples == rollouts


def test_a_leaked_rollout_does_not_make_an_honest_one_a_duplicate() -> None:
    leaked, honest = sample(1.0, token_ids=[1], text="As given, 4"), sample(1.0, token_ids=[1])
    assert hdpo().keep_privileged(group(CLIFF, [leaked, honest])).privileged_samples == [honest]


def test_the_threshold_holds_for_privileged_rollouts_too() -> None:
    half, most = sample(0.5), sample(0.75)
    objective = hdpo(privileged={"success_threshold": 0.75})
    assert objective.keep_privileged(group(CLIFF, [half, most])).privileged_samples == [most]


def test_kept_per_prompt_are_capped_after_the_filters() -> None:
    rollouts = [sample(0.0), sample(1.0), sample(1.0), sample(1.0)]
    kept = hdpo(privileged={"max_kept_per_prompt": 2}).keep_privileged(group(CLIFF, rollouts))
    assert kept.privileged_samples == rollouts[1:3]
    assert kept.dropped == {"wrong": 1, "over_cap": 1}


def _cliff_with_survivors(tops: bool = False):
    survivors = [sample(1.0, n, top=top(n, seed=n) if tops else None) for n in (4, 2)]
    return [group(MIXED, prompt=5), group(CLIFF, survivors, prompt=6)]


def test_the_teacher_scores_after_the_privileged_prompt() -> None:
    groups = _cliff_with_survivors()
    scorings = hdpo(distill={"top_k": 3, "temperature": 1.3}).scorings(groups)
    assert [s.key for s in scorings] == [(1, "privileged", 0, "teacher"), (1, "privileged", 1, "teacher")]
    for s, scoring in enumerate(scorings):
        assert (scoring.role, scoring.top_k, scoring.temperature) == ("teacher", 3, 1.3)
        np.testing.assert_array_equal(scoring.context_ids, [6, 8, 8, 8])
        np.testing.assert_array_equal(scoring.response_ids, groups[1].privileged_samples[s].completion.token_ids)


def test_both_kinds_of_scorings_with_several_updates() -> None:
    kinds = [(s.key[0], s.key[1], s.role) for s in hdpo(updates_per_step=2).scorings(_cliff_with_survivors())]
    assert kinds == [(0, "student", "policy")] * 3 + [(1, "student", "policy")] * 3 + [(1, "privileged", "teacher")] * 2


def test_survivors_are_distilled_after_the_students_own_prompt() -> None:
    groups, objective = _cliff_with_survivors(), hdpo()
    scores = {
        (1, "privileged", s, "teacher"): Score(np.zeros(n), np.zeros(n), top(n, seed=n)) for s, n in enumerate((4, 2))
    }
    examples = objective.examples(groups, scores)
    assert len(examples) == 8
    for example, survivor in zip(examples[6:], groups[1].privileged_samples, strict=True):
        n = survivor.length
        np.testing.assert_array_equal(example.prompt_ids, [6, 1, 2])
        np.testing.assert_array_equal(example.response_ids, survivor.completion.token_ids)
        assert example.target is scores[1, "privileged", survivor.length == 2, "teacher"].top
        np.testing.assert_array_equal(example.distill_weights_T, np.ones(n))
        assert example.distill_count == n and example.surrogate_count == 0.0
        assert not example.advantages_T.any() and not example.surrogate_weights_T.any()
        assert not example.inert
    # The cliff's own rollouts have no advantage, count in the surrogate's mean, and have no target.
    assert all(e.inert and e.surrogate_count == 3 and e.distill_count == 0 for e in examples[3:6])
    assert [e.target for e in examples[:6]] == [None] * 6


def test_the_engines_top_k_needs_no_forward_pass() -> None:
    groups, objective = _cliff_with_survivors(tops=True), hdpo(logits_from="rollout")
    assert objective.scorings(groups) == []
    examples = objective.examples(groups, {})
    assert [e.target for e in examples[6:]] == [s.completion.top_logprobs for s in groups[1].privileged_samples]


def test_a_missing_target_is_an_error_that_names_the_problem() -> None:
    with pytest.raises(ValueError, match=r"problem sums/0: the engine returned no top log-probs.*logits_from=trainer"):
        hdpo(logits_from="rollout").examples(_cliff_with_survivors(), {})


def test_a_target_of_another_length_is_an_error() -> None:
    groups = _cliff_with_survivors(tops=True)
    completion = groups[1].privileged_samples[0].completion
    groups[1].privileged_samples[0].completion = replace(completion, top_logprobs=top(3))
    with pytest.raises(ValueError, match="target has 3 rows for a response of 4 tokens"):
        hdpo(logits_from="rollout").examples(groups, {})


def test_a_cliff_whose_second_try_failed_leaves_grpo_alone() -> None:
    cliff = hdpo().keep_privileged(group(CLIFF, [sample(0.0), sample(0.0)]))
    objective = hdpo()
    assert objective.scorings([cliff]) == []
    assert [e.inert for e in objective.examples([cliff], {})] == [True] * 3


def test_metrics_tell_what_became_of_the_cliffs() -> None:
    objective = hdpo()
    taught = objective.keep_privileged(group(CLIFF, [sample(1.0), sample(0.0), sample(1.0, text="As given, 4")]))
    untaught = objective.keep_privileged(group(CLIFF, [sample(0.0)]))
    metrics = objective.metrics([taught, untaught, group(MIXED), group(SOLVED)])
    assert metrics["rollout/cliff_rate"] == 0.5
    assert metrics["privileged/cliff_prompts"] == 2
    assert metrics["privileged/taught_prompts_rate"] == 0.5
    assert metrics["privileged/success_rate"] == pytest.approx(2 / 4)
    assert metrics["privileged/kept"] == 1
    assert "privileged/taught_prompts_rate" not in objective.metrics([group(MIXED)])
