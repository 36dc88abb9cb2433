"""Every method names metrics that it measures, so that its console has no empty column."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_hdpo.objectives.base import BaseObjective, ObjectiveDeps
from megatron_hdpo.objectives.opd import OPDConfig
from megatron_hdpo.objectives.registry import OBJECTIVES, build_objective
from megatron_hdpo.objectives.settings import ObjectiveSettings
from megatron_hdpo.planner.asked_work import Steps, _ask
from megatron_hdpo.planner.made_up import PromptsOfLength, random_score
from megatron_hdpo.types.headline import DIVERGENCE, ENTROPY, Headline
from megatron_hdpo.types.learning import DivergenceConfig, LossSpec, SurrogateConfig

STEPS = Steps(count=4, updates=1, samples=8, prompt=5, privileged=9, cliff_rate=0.25, solved_rate=0.25)
OF_THE_TRAINER = {"train/grad_norm", "train/lr", "distill/tokens"}
OF_A_SURROGATE = {"train/surrogate_loss", "train/nll", "train/entropy", "train/clip_fraction"}
OF_A_DIVERGENCE = {"distill/divergence", "distill/covered_mass", "distill/entropy"}
CONFIGS = [*(config() for config in OBJECTIVES), OPDConfig(estimator="top_k"), OPDConfig(estimator="full")]


def measured(config: ObjectiveSettings) -> set[str]:
    """Return the names of the metrics of a step with cliffs, solved and mixed groups."""
    asked = _ask(build_objective(config, ObjectiveDeps(prompts=PromptsOfLength(STEPS.privileged))), STEPS, 0)
    objective, groups = asked.objective, asked.groups
    top_k_of = {scoring.key: scoring.top_k for scoring in asked.scorings}
    rng = np.random.default_rng(0)
    scores = {scoring.key: random_score(scoring, top_k_of, rng) for scoring in asked.scorings}
    totals = objective.totals(groups, scores)
    names = {*objective.metrics(groups, objective.counts(groups)), *objective.totals_metrics(totals), *OF_THE_TRAINER}
    live = [example for example in objective.examples(groups, scores, totals) if not example.inert]
    if any(np.any(example.surrogate_weights_T) for example in live):
        names |= OF_A_SURROGATE
    return names | (OF_A_DIVERGENCE if any(example.target is not None for example in live) else set())


@pytest.mark.parametrize("config", CONFIGS, ids=[type(config).__name__ for config in CONFIGS])
def test_every_headline_is_measured(config: ObjectiveSettings) -> None:
    headlines = build_objective(config, ObjectiveDeps()).headlines
    assert {headline.name for headline in headlines} <= measured(config)
    assert len({headline.name for headline in headlines}) == len(headlines) >= 3
    assert len({headline.short for headline in headlines}) == len(headlines)


def test_the_reference_is_shown_where_there_is_one() -> None:
    (config,) = [config for config in OBJECTIVES if config.__name__ == "GRPOConfig"]
    for coefficient in (0.0, 0.1):
        objective = build_objective(config.model_validate({"kl": {"coefficient": coefficient}}), ObjectiveDeps())
        assert ("ref. KL" in [headline.short for headline in objective.headlines]) == bool(coefficient)


@pytest.mark.parametrize(("distill", "shown"), [(None, ENTROPY), (DivergenceConfig(), DIVERGENCE)])
def test_a_new_method_gets_headlines_by_its_loss(distill: DivergenceConfig | None, shown: Headline) -> None:
    class New(BaseObjective):
        loss = LossSpec(SurrogateConfig(), distill, 1.0)  # type: ignore[assignment]

    headlines = New(ObjectiveSettings(), ObjectiveDeps()).headlines
    assert shown in headlines and not {ENTROPY, DIVERGENCE} - {shown} & set(headlines)


def test_a_heading_that_does_not_fit_a_column_is_refused() -> None:
    with pytest.raises(ValueError, match="own/share: 'my share' is longer than 7 characters"):
        Headline("own/share", "my share", "Share")
