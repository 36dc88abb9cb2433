"""OPD, vOPD and AKL: what they ask for, and the numbers they make of it."""

from __future__ import annotations

import numpy as np
import pytest
from rollout_groups import group, sample

from megatron_hdpo.objectives.akl import AKLConfig, build_akl
from megatron_hdpo.objectives.base import ObjectiveDeps
from megatron_hdpo.objectives.opd import OPDConfig, SampledDistillation, build_opd
from megatron_hdpo.objectives.vopd import VOPD, VOPDConfig, renormalised_kl
from megatron_hdpo.types.learning import Score, Scoring
from megatron_hdpo.types.rollouts import TopKArrays

OLD, TAUGHT = [-1.0, -2.0, -9.0], [-1.5, -0.5, -2.0]


def scores_of(scorings: list[Scoring], kl: float = 0.25) -> dict:
    found = {}
    for scoring in scorings:
        values = OLD if scoring.key[3] == "old" else TAUGHT
        logprobs = np.array(values[: len(scoring.response_ids)], dtype=np.float32)
        found[scoring.key] = Score(logprobs, np.zeros(len(logprobs)), reverse_kl_T=np.full(len(logprobs), kl))
    return found


def one_of_each(objective: SampledDistillation, groups: list) -> tuple[list, dict[str, float]]:
    scores = scores_of(objective.scorings(groups))
    totals = objective.totals(groups, scores)
    return objective.examples(groups, scores, totals), objective.totals_metrics(totals)


def test_a_token_that_the_teacher_likes_more_has_a_positive_advantage() -> None:
    objective = build_opd(OPDConfig(), ObjectiveDeps(0.7))
    assert {(s.role, s.temperature) for s in objective.scorings([group([1.0])])} == {
        ("policy", 0.7),
        ("teacher", 0.7),
    }
    (example,), metrics = one_of_each(objective, [group([0.0])])
    np.testing.assert_allclose(example.advantages_T, [-0.5, 1.5, 7.0])
    assert example.surrogate_count == 3 and example.old_logprobs_T is None and example.target is None
    assert metrics["distill/sampled_kl"] == pytest.approx(-8.0 / 3)


def test_clamps() -> None:
    config = OPDConfig.model_validate({"clamp": {"logprob": -4.0, "log_ratio": 1.2}})
    (example,), _ = one_of_each(build_opd(config, ObjectiveDeps(1.0)), [group([0.0])])
    np.testing.assert_allclose(example.advantages_T, [-0.5, 1.2, 1.2])


def test_value_baseline_and_second_moments() -> None:
    objective = VOPD(VOPDConfig(), ObjectiveDeps(1.0, 2))
    (example,), metrics = one_of_each(objective, [group([0.0])])
    np.testing.assert_allclose(example.advantages_T, [-0.25, 1.75, 7.25])
    np.testing.assert_allclose(example.old_logprobs_T, OLD)
    assert metrics["vopd/second_moment"] == pytest.approx(np.mean(np.square([-0.25, 1.75, 7.25])))
    assert metrics["vopd/second_moment_without_baseline"] == pytest.approx(np.mean(np.square([-0.5, 1.5, 7.0])))


def test_the_value_is_the_expected_log_ratio_on_the_top_k() -> None:
    rng = np.random.default_rng(0)
    lq, lp = (np.log(rng.dirichlet(np.ones(6), 4)) for _ in range(2))
    expected = (np.exp(lq) * (lq - lp)).sum(-1)
    np.testing.assert_allclose(renormalised_kl(lq - 3.0, lp - 1.0), expected, rtol=1e-12)
    objective = VOPD(VOPDConfig.model_validate({"baseline": {"kind": "top_k", "top_k": 6}}), ObjectiveDeps(1.0))
    student, teacher = objective.scorings([group([sample(0.0, 4)])])
    assert student.top_k == 6 and teacher.at == student.key and not teacher.hidden
    scores = {
        student.key: Score(np.zeros(4), np.zeros(4), TopKArrays(np.zeros((4, 6), dtype=np.int32), lq - 3.0)),
        teacher.key: Score(np.full(4, -1.0), np.zeros(4), at_logprobs_TK=lp - 1.0),
    }
    (example,) = objective.examples([group([sample(0.0, 4)])], scores)
    np.testing.assert_allclose(example.advantages_T, -1.0 + expected, rtol=1e-5)


@pytest.mark.parametrize("estimator", ["single_sample", "top_k", "full"])
def test_groups_without_rollouts_and_cut_or_empty_ones(estimator: str) -> None:
    objective = build_opd(OPDConfig.model_validate({"estimator": estimator, "overlong": "mask"}), ObjectiveDeps(1.0))
    nothing = group([sample(1.0, 4, cut=True), sample(0.0, 0)])
    assert not objective.has_signal(nothing) and not objective.has_signal(group([]))
    assert objective.has_signal(group([1.0, 1.0])) and objective.privileged_rollouts_for(group([0.0]), 0) == 0
    assert objective.scorings([nothing, group([])]) == [] == objective.examples([nothing], {}, {})
    assert objective.totals_metrics(objective.totals([nothing], {})) == {}


def test_akl_of_the_teachers_tokens_reads_both_prompts() -> None:
    objective = build_akl(AKLConfig.model_validate({"tokens": "teacher", "rollouts": 3}), ObjectiveDeps(1.0))
    taught = group([0.0, 1.0], [sample(0.0, 2), sample(1.0, 3)])
    assert objective.privileged_rollouts_for(taught, 0) == 3 and objective.has_signal(taught)
    assert not objective.has_signal(group([0.0]))
    scorings = objective.scorings([taught])
    assert [s.key for s in scorings] == [(0, "privileged", i, "teacher") for i in range(2)]
    assert all(s.context_ids.tolist() == [7, 8, 8, 8] and s.top_k == 100 for s in scorings)
    scores = {
        s.key: Score(np.zeros(n), np.zeros(n), TopKArrays(np.zeros((n, 1), dtype=np.int32), np.zeros((n, 1))))
        for s in scorings
        for n in [len(s.response_ids)]
    }
    examples = objective.examples([taught], scores)
    assert [e.prompt_ids.tolist() for e in examples] == [[7, 1, 2]] * 2 and [e.distill_count for e in examples] == [
        2,
        3,
    ]
