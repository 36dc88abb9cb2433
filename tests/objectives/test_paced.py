"""PACED: weights by pass rate, when pass rates are measured, and its two stages."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from hint_prompts import SUPPORT, StubPrompts, answers
from rollout_groups import group, sample

from megatron_hdpo.objectives.base import ObjectiveDeps
from megatron_hdpo.objectives.paced import PACED, PACEDConfig
from megatron_hdpo.objectives.settings import RecipeContext

TOP = {"kind": "forward_kl", "tail": "bucket", "top_k": SUPPORT, "coefficient": 1.0}


def paced(switch_step: int = 4, **settings: Any) -> PACED:
    config = PACEDConfig.model_validate({"distill": TOP, "switch_step": switch_step, **settings})
    return PACED(config, ObjectiveDeps(1.0, prompts=StubPrompts()))


def small(*rewards: float, problem: str = "sums/0", length: int = 2, privileged=()):
    """Token ids below the vocabulary of the made-up model."""
    samples = [sample(float(r), token_ids=[(7 * i + t) % 40 for t in range(length)]) for i, r in enumerate(rewards)]
    return group(samples, privileged, problem=problem)


def weight_of(objective: PACED, rewards: list[float]) -> float:
    return objective.weight(small(*rewards), 0)


def test_weights_are_largest_at_even_odds_and_nothing_at_the_ends() -> None:
    objective = paced()
    assert weight_of(objective, [1, 0]) == 0.25 and weight_of(objective, [1, 0, 0, 0]) == 0.1875
    assert [weight_of(objective, rewards) for rewards in ([1, 1], [0, 0], [])] == [0.0, 0.0, 0.0]
    skewed = paced(pass_exponent=2.0, fail_exponent=0.0)
    assert weight_of(skewed, [1, 0]) == 0.25 and weight_of(skewed, [1, 1]) == 0.0


@pytest.mark.parametrize(
    ("every", "step", "remembered"), [(None, 3, True), (None, 4, False), (2, 1, True), (2, 2, False), (1, 1, False)]
)
def test_pass_rates_are_measured_once_per_period(every: int | None, step: int, remembered: bool) -> None:
    """The switch is at 4: a rate of before it is not one of after it."""
    objective = paced(reestimate_every=every)
    objective.begin_step(0, [small(1, 0, 0, 0)])
    assert objective.weight(small(1, 1, 0, 0), step) == (0.1875 if remembered else 0.25)
    objective.begin_step(step, [small(1, 1, 0, 0)])
    assert objective.rates["sums/0"] == ((0.25, 0) if remembered else (0.5, step))


def test_a_group_without_rollouts_has_the_weight_that_is_remembered() -> None:
    objective = paced()
    objective.begin_step(0, [small(1, 0)])
    objective.begin_step(5, [small()])
    assert objective.weight(small(), 5) == 0.25 and objective.weight(small(problem="sums/9"), 5) == 0.0


def test_pass_rates_survive_a_checkpoint() -> None:
    first, second = paced(), paced()
    first.begin_step(3, [small(1, 0, 0, 0), small(1, 1, problem="sums/1"), small(problem="sums/2")])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.rates == first.rates == {"sums/0": (0.25, 3), "sums/1": (1.0, 3)}


def test_the_first_stage_learns_from_right_privileged_rollouts() -> None:
    objective = paced(privileged={"rollouts": 6})
    mixed, solved = small(1, 0), small(1, 1, problem="sums/1")
    assert [objective.privileged_rollouts_for(g, 3) for g in (mixed, solved, small(0, 0))] == [6, 0, 0]
    assert objective.privileged_rollouts_for(mixed, 4) == 0
    taught = small(1, 0, privileged=[sample(1.0, token_ids=[1, 2, 3]), sample(0.0, token_ids=[4])])
    taught = objective.keep_privileged(taught)
    objective.begin_step(3, [taught, solved])
    scorings = objective.scorings([taught, solved])
    assert [s.key for s in scorings] == [(0, "privileged", 0, "teacher")]
    assert scorings[0].context_ids.tolist() == taught.privileged_prompt_ids.tolist()
    scores = answers(scorings)
    (example,) = objective.examples([taught, solved], scores, objective.totals([taught, solved], scores))
    assert example.response_ids.tolist() == [1, 2, 3] and example.prompt_ids.tolist() == taught.prompt_ids.tolist()
    np.testing.assert_allclose(example.distill_weights_T, 1.0)
    assert objective.loss.distill.kind == "forward_kl"


def test_the_second_stage_learns_from_the_students_rollouts() -> None:
    objective = paced()
    groups = [small(1, 0, 0, 0, length=3), small(1, 0, problem="sums/1", length=1), small(1, 1, problem="sums/2")]
    objective.begin_step(4, groups)
    assert objective.loss.distill.kind == "reverse_kl" and objective.loss.distill.tail == "bucket"
    scorings = objective.scorings(groups)
    assert {s.key[0] for s in scorings} == {0, 1}  # no pass for prompts of weight 0
    scores = answers(scorings)
    totals = objective.totals(groups, scores)
    assert totals == pytest.approx({"paced/weight": 12 * 0.1875 + 2 * 0.25, "paced/tokens": 18.0})
    examples = objective.examples(groups, scores, totals)
    weighted = sum(float(e.distill_weights_T.sum()) for e in examples)
    assert weighted == pytest.approx(18.0) and sum(e.distill_count for e in examples) == 18.0  # mean 1
    ratio = examples[4].distill_weights_T[0] / examples[0].distill_weights_T[0]
    assert ratio == pytest.approx(0.25 / 0.1875) and all(e.inert for e in examples[6:])
    assert objective.totals_metrics(totals) == pytest.approx({"paced/mean_weight": 2.75 / 18, "paced/stage": 2.0})


def test_raw_weights() -> None:
    objective = paced(switch_step=0, weights="raw")
    groups = [small(1, 0, 0, 0), small(1, 1, problem="sums/1")]
    objective.begin_step(0, groups)
    scores = answers(objective.scorings(groups))
    examples = objective.examples(groups, scores, objective.totals(groups, scores))
    assert all((e.distill_weights_T == np.float32(0.1875)).all() for e in examples[:4])
    assert sum(e.distill_count for e in examples) == 12.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distill": TOP | {"tail": "outside"}}, "second_kind: reverse_kl is infinite .*tail=bucket"),
        ({"distill": TOP | {"top_k": 2000}}, "distill.top_k: 2000 exceeds"),
        ({"distill": TOP | {"kind": "reverse_kl", "tail": "outside"}}, "distill.kind: reverse_kl is infinite"),
    ],
)
def test_settings_that_cannot_be_computed(settings: dict, message: str) -> None:
    context = RecipeContext(1000, "policy", 1.0, samples_per_prompt=4)
    lines = PACEDConfig.model_validate(settings).errors(context)
    assert any(re.match(message, line) for line in lines)


def test_defaults_can_be_computed_and_one_rollout_is_no_pass_rate() -> None:
    assert not list(PACEDConfig().errors(RecipeContext(1000, "frozen", 1.0, samples_per_prompt=8)))
    assert any("2 or more" in line for line in PACEDConfig().errors(RecipeContext(1000, "frozen", 1.0)))
