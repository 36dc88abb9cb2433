"""What each method of privileged context does with its groups, in numbers that can be checked by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hint_prompts import StubPrompts
from rollout_groups import group, sample, top

from megatron_hdpo.objectives.base import ObjectiveDeps
from megatron_hdpo.objectives.contrastive_opsd import ContrastiveOPSD, ContrastiveOPSDConfig, with_rest
from megatron_hdpo.objectives.opsd import OPSD, OPSDConfig
from megatron_hdpo.objectives.rlcsd import RLCSD, RLCSDConfig
from megatron_hdpo.objectives.rlsd import RLSD, RLSDConfig
from megatron_hdpo.objectives.sdpo import SDPO, SDPOConfig
from megatron_hdpo.objectives.settings import RecipeContext
from megatron_hdpo.objectives.srpo import SRPO, SRPOConfig
from megatron_hdpo.types.learning import Score
from megatron_hdpo.types.rollouts import TopKArrays

AROUND = RecipeContext(vocab_size=1000, teacher="policy", temperature=1.0, samples_per_prompt=8)
BOX = "so \\boxed{4}"


def boxed(*rewards: float, length: int = 3):
    return group([sample(reward, length, text=f"{BOX} {i}") for i, reward in enumerate(rewards)])


def score(logprobs: Any, entropy: float = 0.0, top_logprobs: TopKArrays | None = None, at: Any = None) -> Score:
    values = np.asarray(logprobs, dtype=np.float32)
    return Score(values, np.full(len(values), entropy, np.float32), top_logprobs, at)


# OPSD and SDPO.


def test_opsd_learns_from_every_rollout_right_or_wrong() -> None:
    made, objective = (
        [boxed(1, 0), boxed(0, 0, 0), group([])],
        OPSD(OPSDConfig(), ObjectiveDeps(1.0, prompts=StubPrompts())),
    )
    scorings = objective.scorings(made)
    assert [s.key for s in scorings] == [(g, "student", s, "teacher") for g, n in ((0, 2), (1, 3)) for s in range(n)]
    assert {(s.role, s.top_k) for s in scorings} == {("teacher", 100)}
    scores = {s.key: score([0, 0, 0], top_logprobs=top(3, 4)) for s in scorings}
    examples = objective.examples(made, scores)
    assert [e.distill_count for e in examples] == [3.0] * 5 and not any(e.surrogate_count for e in examples)
    assert all((e.distill_weights_T == 1).all() for e in examples)


def test_a_missing_score_is_an_error() -> None:
    with pytest.raises(ValueError, match="problem sums/0: there is no score for rollout 0"):
        OPSD(OPSDConfig(), ObjectiveDeps(1.0, prompts=StubPrompts())).examples([boxed(1)], {})


def test_sdpo_masks_samples_without_demonstration() -> None:
    """The lone success has no sibling, and nothing was said of it."""
    made, objective = boxed(0, 1, 0), SDPO(SDPOConfig(), ObjectiveDeps(0.8, prompts=StubPrompts()))
    scorings = objective.scorings([made])
    assert {s.key[2] for s in scorings} == {0, 2} and objective.prompts.shown[0].attempt == f"{BOX} 1"
    own, taught = scorings[:2]
    assert (own.role, own.key[3], own.top_k) == ("policy", "support", 100)
    assert (taught.role, taught.at, taught.top_k) == ("teacher", own.key, 0)
    metrics = objective.metrics([made], objective.counts([made]))
    assert metrics["distill/masked_share"] == pytest.approx(1 / 3)
    assert metrics["distill/sibling_share"] == pytest.approx(2 / 3) and metrics["distill/feedback_share"] == 0.0
    made.samples[1].feedback = "too long"
    assert objective.metrics([made], objective.counts([made]))["distill/masked_share"] == 0.0


# SRPO.


def test_srpo_routes_by_reward_and_counts_every_token_in_both_normalisers() -> None:
    """All right: plain, although their advantage is 0. All wrong without demonstration: counted, without signal."""
    groups, objective = (
        [boxed(1, 0, 1), boxed(1, 1), boxed(0, 0)],
        SRPO(SRPOConfig(), ObjectiveDeps(1.0, prompts=StubPrompts())),
    )
    scorings = objective.scorings(groups)
    assert {s.key[:3] for s in scorings} == {(0, "student", 1)}
    entropies = np.array([0.0, math.log(2), math.log(4)], np.float32)
    support = top(3, 4)
    scores = {
        (0, "student", 1, "support"): score([0, 0, 0], top_logprobs=support),
        (0, "student", 1, "teacher"): Score(np.zeros(3), entropies, at_logprobs_TK=support.logprobs_TK),
    }
    totals = objective.totals(groups, scores)
    assert totals == pytest.approx({"srpo/weight": 1.75, "srpo/tokens": 3.0})
    examples = objective.examples(groups, scores, totals)
    assert [(e.surrogate_count, e.distill_count) for e in examples] == [(3.0, 3.0)] * 7
    np.testing.assert_allclose(examples[1].distill_weights_T, np.array([1, 0.5, 0.25]) * 3 / 1.75, rtol=1e-6)
    assert examples[1].distill_weights_T.mean() == pytest.approx(1.0)
    assert not examples[1].surrogate_weights_T.any() and examples[0].distill_weights_T is None
    np.testing.assert_allclose(examples[0].advantages_T, 0.5)  # without a std
    assert [e.inert for e in examples] == [False] * 3 + [True] * 4
    assert objective.metrics(groups, objective.counts(groups))["srpo/distilled_share"] == pytest.approx(1 / 7)


# RLSD.


@pytest.mark.parametrize(("step", "mix"), [(0, 0.5), (10, 0.4), (49, 0.01), (50, 0.0), (999, 0.0)])
def test_the_mix_of_rlsd_falls_to_nothing(step: int, mix: float) -> None:
    config = RLSDConfig()
    assert config.mix_at(step) == pytest.approx(mix) and RLSDConfig(mix_steps=None).mix_at(step) == 0.5
    objective = RLSD(config, ObjectiveDeps(1.0, prompts=StubPrompts()))
    objective.begin_step(step, [])
    assert bool(objective.scorings([boxed(1, 0)])) == (mix > 0)  # without weight no pass is asked for


def test_rlsd_moves_advantages_by_clamped_evidence() -> None:
    objective = RLSD(RLSDConfig(advantage="none", mix=0.5, mix_steps=None), ObjectiveDeps(0.7, prompts=StubPrompts()))
    made = group([sample(1.0, 4), sample(-1.0, 4)])
    keys = {(s.key[2], s.key[3], s.role, s.temperature) for s in objective.scorings([made])}
    assert keys == {(s, *rest, 0.7) for s in (0, 1) for rest in (("hinted", "teacher"), ("old", "policy"))}
    evidence = np.array([0.1, -0.1, 9.0, -9.0])
    scores = {}
    for s in (0, 1):
        scores[0, "student", s, "hinted"] = score(evidence - 10)
        scores[0, "student", s, "old"] = score(np.full(4, -10.0))
    right, wrong = objective.examples([made], scores)
    factors = np.array([math.exp(0.1), math.exp(-0.1), 1.2, 0.8])
    np.testing.assert_allclose(right.advantages_T, 0.5 + 0.5 * factors, rtol=1e-5)
    blame = np.array([math.exp(-0.1), math.exp(0.1), 0.8, 1.2])
    np.testing.assert_allclose(wrong.advantages_T, -(0.5 + 0.5 * blame), rtol=1e-5)
    assert right.old_logprobs_T is None
    metrics = objective.totals_metrics(objective.totals([made], scores))
    assert metrics["rlsd/clipped"] == 0.5 and metrics["rlsd/factor"] == pytest.approx((factors.sum() * 2) / 8, rel=1e-5)


def test_rlsd_with_contrast_leaves_rollouts_without_a_pair_plain() -> None:
    made, objective = boxed(1, 0, 0), RLSD(RLSDConfig(evidence="contrast"), ObjectiveDeps(1.0, prompts=StubPrompts()))
    scorings = objective.scorings([made])
    assert sorted({s.key[2] for s in scorings}) == [1, 2] and {s.key[3] for s in scorings} == {"right", "wrong"}
    scores = {s.key: score([-1.0] * 3 if s.key[3] == "right" else [-9.0] * 3) for s in scorings}
    lone, *others = objective.examples([made], scores)
    plain = 2 / 3 / math.sqrt(1 / 3)
    np.testing.assert_allclose(lone.advantages_T, plain, rtol=1e-5)
    for example in others:
        np.testing.assert_allclose(example.advantages_T, -plain / 2 * (0.5 + 0.5 * 0.8), rtol=1e-5)
    assert RLSDConfig().hint_shows == frozenset() and RLSDConfig(evidence="contrast").hint_shows == {"attempt"}
    assert RLSDConfig().needs_privileged and not RLSDConfig(evidence="contrast").needs_privileged


# RLCSD.


def rlcsd_scores(objective: RLCSD, made, s: int, right: list[float], wrongs: list[list[float]]) -> dict:
    keys = [scoring.key for scoring in objective.scorings([made]) if scoring.key[2] == s]
    assert [key[3] for key in keys] == ["right", *(f"wrong{k}" for k in range(len(wrongs)))]
    return {key: score(values) for key, values in zip(keys, [right, *wrongs], strict=True)}


def test_rlcsd_moves_masks_and_holds() -> None:
    """Seven right, one wrong: a success has advantage 0.354, less than the move of 0.5, so the sign holds it at 0."""
    made = boxed(1, 1, 1, 1, 1, 1, 1, 0, length=4)
    objective = RLCSD(RLCSDConfig(), ObjectiveDeps(1.0, prompts=StubPrompts()))
    scores = {}
    for s in range(7):
        scores |= rlcsd_scores(objective, made, s, [-1.0, -1.0, -1.0, -1.001], [[-1.0, -5.0, -0.5, -1.0005]])
    assert not [scoring for scoring in objective.scorings([made]) if scoring.key[2] == 7]  # the lone failure
    totals = objective.totals([made], scores)
    assert totals == {"rlcsd/rollouts": 7, "rlcsd/plain": 14, "rlcsd/moved": 14, "rlcsd/held": 7}
    examples = objective.examples([made], scores, totals)
    advantage = 0.125 / math.sqrt(1 / 8)
    for example in examples:
        np.testing.assert_allclose(example.advantages_T, [advantage, advantage + 0.5, 0.0, advantage], atol=2e-3)
        np.testing.assert_allclose(example.surrogate_weights_T, [0.5, 0.5, 0.5, 0.5])
        assert example.surrogate_count == 1.0
    assert objective.totals_metrics(totals) == {"rlcsd/moved_share": 0.5, "rlcsd/held_share": 0.5}
    assert objective.metrics([made], objective.counts([made]))["rlcsd/left_out_share"] == pytest.approx(1 / 8)


def test_rlcsd_takes_the_mean_of_probabilities_over_the_wrong_siblings() -> None:
    made = boxed(1, 0, 0, 0)
    objective = RLCSD(RLCSDConfig(evidence_scale=5.0, threshold=0.0), ObjectiveDeps(1.0, prompts=StubPrompts()))
    scores = {}
    for s in (1, 2, 3):
        scores |= rlcsd_scores(objective, made, s, [-2.0, -2.0, -2.0], [[-1.0, -2.0, -3.0], [-4.0, -2.0, -3.0]])
    mean = [math.log((math.exp(a) + math.exp(b)) / 2) for a, b in ((-1, -4), (-2, -2), (-3, -3))]
    moves = [0.5 * math.tanh((-2 - m) / 5) for m in mean]
    example = objective.examples([made], scores, objective.totals([made], scores))[0]
    np.testing.assert_allclose(example.advantages_T, -0.5 + np.array(moves), atol=1e-6)
    np.testing.assert_allclose(example.surrogate_weights_T, [0.5, 1.0, 0.5])  # no evidence at all: the plain path


def test_rlcsd_draws_at_most_k_wrong_siblings_and_draws_anew_each_step() -> None:
    made, objective = boxed(1, 1, *[0] * 6), RLCSD(RLCSDConfig(negatives=3), ObjectiveDeps(1.0, prompts=StubPrompts()))
    drawn = set()
    for step in range(20):
        objective.begin_step(step, [made])
        objective.prompts.shown.clear()
        names = [s.key[3] for s in objective.scorings([made]) if s.key[2] == 0]
        assert names == ["right", "wrong0", "wrong1", "wrong2"]
        hints = objective.prompts.shown[:4]
        assert hints[0].attempt == f"{BOX} 1" and len({h.attempt for h in hints}) == 4
        assert {h.answer for h in hints} == {"4"}
        drawn.add(tuple(h.attempt for h in hints[1:]))
    assert len(drawn) > 10


# Contrastive OPSD.


def contrastive(**settings: Any) -> tuple[Any, dict, TopKArrays]:
    objective = ContrastiveOPSD(
        ContrastiveOPSDConfig.model_validate(settings), ObjectiveDeps(1.0, prompts=StubPrompts())
    )
    first = TopKArrays(np.array([[3, 5]], np.int32), np.log(np.array([[0.6, 0.3]], np.float32)))
    after_wrong = np.log(np.array([[0.2, 0.6]], np.float32))
    scores = {}
    for scoring in objective.scorings([boxed(1, 1, 0, length=1)]):
        right = scoring.key[3] == "right"
        scores[scoring.key] = score([0.0], top_logprobs=first if right else None, at=None if right else after_wrong)
    return objective, scores, first


def test_without_guidance_and_weights_it_is_opsd_with_a_sibling() -> None:
    objective, scores, first = contrastive(guidance=0.0, half_weight=0.0)
    examples = objective.examples([boxed(1, 1, 0, length=1)], scores)
    assert len(examples) == 2  # the lone failure has no wrong sibling
    for example in examples:
        np.testing.assert_allclose(example.target.logprobs_TK, first.logprobs_TK, rtol=1e-6)
        np.testing.assert_array_equal(example.distill_weights_T, [1.0])
        assert example.distill_count == 1.0


def test_the_guided_target_and_its_weight() -> None:
    objective, scores, _ = contrastive(guidance=0.5, half_weight=2.0)
    example = objective.examples([boxed(1, 1, 0, length=1)], scores)[0]
    right, wrong = [0.6, 0.3, 0.1], [0.2, 0.6, 0.2]
    raw = [c**1.5 / w**0.5 for c, w in zip(right, wrong, strict=True)]
    np.testing.assert_allclose(np.exp(example.target.logprobs_TK[0]), np.array(raw[:2]) / sum(raw), rtol=1e-5)
    kl = sum(c * math.log(c / w) for c, w in zip(right, wrong, strict=True))
    np.testing.assert_allclose(example.distill_weights_T, [kl / (kl + 2.0)], rtol=1e-5)


def test_the_floor_bounds_what_the_wrong_sibling_says() -> None:
    objective, scores, _ = contrastive(guidance=1.0, floor=-1.0)
    example = objective.examples([boxed(1, 1, 0, length=1)], scores)[0]
    raw = [0.6**2 / math.exp(-1), 0.3**2 / 0.6, 0.1**2 / math.exp(-1)]
    np.testing.assert_allclose(np.exp(example.target.logprobs_TK[0]), np.array(raw[:2]) / sum(raw), rtol=1e-5)


def test_the_rest_of_a_support_that_is_everything_is_finite() -> None:
    assert np.isfinite(with_rest(np.log(np.array([[0.5, 0.5 + 1e-6]], np.float32)))).all()


# Settings that cannot be.


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SRPOConfig(aggregation="sequence"), "aggregation: srpo divides both losses by the tokens of both"),
        (SRPOConfig(distill={"kind": "reverse_kl"}), "distill.kind: reverse_kl is infinite"),
        (OPSDConfig(distill={"top_k": 2000}), "distill.top_k: 2000 exceeds the vocabulary of 1000"),
        (RLCSDConfig(threshold=0.6), "threshold: no token moves by more than bonus=0.5"),
        (
            ContrastiveOPSDConfig(distill={"support": "full"}),
            "distill.support: the target is made on the teacher's top",
        ),
        (ContrastiveOPSDConfig(distill={"tail": "renormalise"}), "distill.tail: the target is made with a bucket"),
    ],
)
def test_settings_that_cannot_be_computed(config: Any, message: str) -> None:
    assert any(line.startswith(message) for line in config.errors(AROUND))


@pytest.mark.parametrize("config", [OPSDConfig, SDPOConfig, SRPOConfig, RLSDConfig, RLCSDConfig, ContrastiveOPSDConfig])
def test_defaults_can_be_computed_and_know_their_teachers(config: Any) -> None:
    assert not list(config().errors(AROUND))
    assert {"policy", "frozen", "snapshot", "ema"} <= set(config.teachers)
    assert config.model_validate(config().model_dump()) == config()
