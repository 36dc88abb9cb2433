"""PACED: distillation weighted by p^a (1 - p)^b of a prompt's pass rate p, in two stages.

arXiv 2603.11178, its self-distillation track: the teacher is the model that reads the reference solution. Before
`switch_step` the divergence is forward KL on privileged rollouts that are right, from it on reverse KL on the
student's own rollouts. Pass rates are those of the student's rollouts at the first step with the prompt, and again in
each new period: at the switch, and every `reestimate_every` steps if that is set.

Weights are normalised to mean 1 over the tokens of the step, so that L = sum w D / sum w; prompts of weight 0 then
change nothing. `weights: raw` leaves them: L = sum w D / N, at most a quarter of the unweighted loss for a = b = 1. The
paper does not say which. Decided here: a mean over tokens, not over prompts, because then L is a mean of D. Prompts
with p = 0 or p = 1 have weight 0 for all exponents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from megatron_hdpo.objectives.base import NO_TOTALS, ObjectiveDeps
from megatron_hdpo.objectives.distillation import Distillation, StudentDistillationConfig
from megatron_hdpo.objectives.examples import (
    SampleKey,
    privileged_samples,
    sample_distillation,
    target_of,
    target_scorings,
)
from megatron_hdpo.objectives.privileged import PrivilegedFilter, PrivilegedRolloutConfig, privileged_metrics
from megatron_hdpo.objectives.settings import FROZEN, RecipeContext, TeacherSection
from megatron_hdpo.types.divergences import DivergenceKind
from megatron_hdpo.types.headline import Headline
from megatron_hdpo.types.learning import DivergenceConfig, Example, LossSpec, Score, Scoring, ScoringKey
from megatron_hdpo.types.rollouts import Group, JudgedGroup, Sample

_WEIGHT = Headline("paced/mean_weight", "weight", "Mean weight of a token before normalisation")


class PACEDConfig(StudentDistillationConfig):
    """Distillation weighted by pass rates, in two stages."""

    privileged_prompts: ClassVar[bool] = True
    default_teacher: ClassVar[TeacherSection | None] = FROZEN

    name: Literal["paced"] = "paced"
    distill: DivergenceConfig = Field(
        default_factory=lambda: DivergenceConfig(coefficient=1.0, kind="forward_kl", tail="bucket", top_k=100),
        description="The divergence and its weight; its kind is that of the first stage.",
    )
    second_kind: DivergenceKind = Field("reverse_kl", description="Which divergence from switch_step on.")
    switch_step: int = Field(
        50, ge=0, description="Rollout step, from 0, at which the second stage begins; 0: no first stage."
    )
    privileged: PrivilegedRolloutConfig = Field(
        default_factory=PrivilegedRolloutConfig, description="The teacher's rollouts of the first stage."
    )
    pass_exponent: float = Field(1.0, ge=0, description="a: exponent of the pass rate p.")
    fail_exponent: float = Field(1.0, ge=0, description="b: exponent of 1 - p.")
    weights: Literal["mean_one", "raw"] = Field("mean_one", description="Normalised over the step's tokens, or not.")
    reestimate_every: int | None = Field(
        None, ge=1, description="Rollout steps after which pass rates are measured again; null: at the switch only."
    )

    def errors(self, context: RecipeContext) -> Iterator[str]:
        """Yield why a divergence of either stage cannot be computed, or why there are too few samples per prompt."""
        yield from super().errors(context)
        second = self.second.errors(context.vocab_size)
        yield from (line.replace("distill.kind", "second_kind") for line in second if "distill.top_k" not in line)
        if context.samples_per_prompt < 2:
            yield "name: paced weights prompts by pass rates, which need rollout.samples_per_prompt of 2 or more"

    @property
    def second(self) -> DivergenceConfig:
        """Return the divergence of the second stage."""
        return self.distill.model_copy(update={"kind": self.second_kind})


class PACED(Distillation):
    """Two-stage distillation. `rates`: pass rate by problem id, with the step that measured it."""

    config: PACEDConfig

    def __init__(self, config: PACEDConfig, deps: ObjectiveDeps) -> None:
        super().__init__(config, deps)
        self.filter = PrivilegedFilter(config.privileged, deps.leakage, tuple(deps.prompts.markers))
        self.rates: dict[str, tuple[float, int]] = {}

    @property
    def loss(self) -> LossSpec:
        """Return the divergence of the current stage."""
        first = self.step < self.config.switch_step
        return replace(super().loss, distill=self.config.distill if first else self.config.second)

    def begin_step(self, step: int, groups: Sequence[JudgedGroup]) -> None:
        """Store the step, and the pass rates that it measures."""
        super().begin_step(step, groups)
        self.rates |= {g.problem.id: measured for g in groups if (measured := self._measured(g, step)) is not None}

    def weight(self, group: JudgedGroup, step: int) -> float:
        """Return p^a (1 - p)^b of the group's prompt, before normalisation; 0 if p is 0, 1 or not measured."""
        measured = self._measured(group, step)
        if measured is None or measured[0] in (0.0, 1.0):
            return 0.0
        return measured[0] ** self.config.pass_exponent * (1.0 - measured[0]) ** self.config.fail_exponent

    def privileged_rollouts_for(self, group: Group, step: int) -> int:
        """Return the number of privileged samples: in the first stage those of the config if the weight is not 0."""
        first = step < self.config.switch_step
        return self.config.privileged.rollouts if first and self.weight(group, step) > 0 else 0

    def keep_privileged(self, group: Group) -> Group:
        """Return the group with its right, distinct, honest privileged samples."""
        return self.filter.keep(group)

    def has_signal(self, group: Group) -> bool:
        """Return whether the weight of the prompt is not 0."""
        return self.weight(group, self.step) > 0

    def scorings(self, groups: Sequence[Group]) -> list[Scoring]:
        """Return the scorings of the current stage's samples whose prompt has a weight other than 0."""
        scorings: list[Scoring] = []
        for key, group, sample in self.trained(groups):
            if self.weight(group, self.step) > 0:
                scorings += self._score(key, group, sample)
        return scorings

    def _score(self, key: SampleKey, group: Group, sample: Sample) -> Iterator[Scoring]:
        if key[1] == "student":
            yield from super()._score(key, group, sample)
            return
        assert group.privileged_prompt_ids is not None
        context = group.privileged_prompt_ids
        yield from target_scorings(key, group.prompt_ids, context, sample, self.config.distill)

    def teacher_context(self, group: Group, index: int) -> np.ndarray:
        """Return the prompt that shows the ground truth, int32 [P]."""
        return self.prompts.privileged_prompt(group.problem)

    def trained(self, groups: Sequence[Group]) -> Iterator[tuple[SampleKey, Group, Sample]]:
        """Yield the privileged samples in the first stage, the student's in the second, with key and group."""
        if self.step >= self.config.switch_step:
            yield from super().trained(groups)
            return
        yield from (found for found in privileged_samples(groups) if found[2].length > 0)

    @property
    def headlines(self) -> Sequence[Headline]:
        """Return the headlines of every distillation, and the mean weight of a token."""
        first, *rest = super().headlines
        return (first, _WEIGHT, *rest)

    def totals(self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score]) -> dict[str, float]:
        """Return the number of tokens of the stage's samples, and the sum of their weights."""
        rollouts = [(self.weight(group, self.step), sample.length) for _, group, sample in self.trained(groups)]
        return {
            "paced/weight": sum(weight * length for weight, length in rollouts),
            "paced/tokens": float(sum(length for _, length in rollouts)),
        }

    def examples(
        self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score], totals: Mapping[str, float] = NO_TOTALS
    ) -> list[Example]:
        """Return one example per sample of the stage, weighted by its prompt; weight 0 only counts the tokens."""
        examples = []
        for key, group, sample in self.trained(groups):
            weight = self.weight(group, self.step)
            if weight == 0:
                examples.append(_count_only(group, sample))
                continue
            if self.config.weights == "mean_one":
                weight *= totals["paced/tokens"] / totals["paced/weight"]
            target, weights_T = target_of(key, scores, self.config.distill), np.full(sample.length, weight)
            examples.append(
                sample_distillation(
                    key=key, group=group, sample=sample, target=target, scores=scores, weights_T=weights_T
                )
            )
        return examples

    def totals_metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Return the mean weight of a token before normalisation, and the stage (1 or 2)."""
        tokens = totals["paced/tokens"]
        mean = {"paced/mean_weight": totals["paced/weight"] / tokens} if tokens else {}
        return mean | {"paced/stage": 1.0 if self.step < self.config.switch_step else 2.0}

    def metrics(self, groups: Sequence[JudgedGroup], counts: Mapping[str, float] = NO_TOTALS) -> dict[str, float]:
        """Return the shares of solved, mixed and cliff groups, and how many privileged samples were kept or dropped."""
        return self.shares(groups, self.config.privileged.success_threshold) | privileged_metrics(groups)

    def state_dict(self) -> dict[str, Any]:
        """Return the pass rates by problem, each with the step that measured it."""
        return {"rates": {problem: list(measured) for problem, measured in self.rates.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the pass rates."""
        self.rates = {problem: (float(rate), int(step)) for problem, (rate, step) in state["rates"].items()}

    def _measured(self, group: JudgedGroup, step: int) -> tuple[float, int] | None:
        """Return the pass rate of the prompt and the step that measured it; None if it is unknown.

        A stored rate of the same period comes first, then the rate of this group's samples, then any stored rate.
        """
        known = self.rates.get(group.problem.id)
        if not group.samples or (known is not None and self._period(known[1]) == self._period(step)):
            return known
        return sum(map(self.filter.is_right, group.samples)) / len(group.samples), step

    def _period(self, step: int) -> tuple[bool, int]:
        every = self.config.reestimate_every
        return step >= self.config.switch_step, step // every if every else 0


def _count_only(group: Group, sample: Sample) -> Example:
    """Return an example without a loss that counts its tokens."""
    zeros_T = np.zeros(sample.length, dtype=np.float32)
    ids = sample.completion.token_ids
    return Example(
        group.prompt_ids, ids, zeros_T, zeros_T, distill_weights_T=zeros_T, distill_count=float(sample.length)
    )
