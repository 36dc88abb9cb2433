"""Distillation on the student's own rollouts: the base of OPSD and the methods like it.

L = coefficient * (1/N) sum_t v_t D(teacher(. | its own context, y_<t), q(. | x, y_<t)) over the tokens of the rollouts,
the gradient through q only. A method says which context the teacher reads before a rollout; a rollout without one is
masked out: it has no loss and does not count in N.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from megatron_hdpo.objectives.base import NO_TOTALS, BaseObjective
from megatron_hdpo.objectives.examples import (
    SampleKey,
    is_masked,
    own_scoring,
    sample_distillation,
    target_of,
    target_scorings,
)
from megatron_hdpo.objectives.settings import ANY_TEACHER, ObjectiveSettings, RecipeContext, TeacherKind
from megatron_hdpo.types.headline import (
    CLIFF_RATE,
    COVERED_MASS,
    DISTILLED_ENTROPY,
    DIVERGENCE,
    GRADIENT_NORM,
    SOLVED_RATE,
    Headline,
)
from megatron_hdpo.types.learning import (
    DivergenceConfig,
    Example,
    LossSpec,
    Score,
    Scoring,
    ScoringKey,
    SurrogateConfig,
)
from megatron_hdpo.types.rollouts import Group, JudgedGroup, Sample


class StudentDistillationConfig(ObjectiveSettings):
    """Keys of methods that distil on the student's own rollouts and have no reward in their loss."""

    teachers: ClassVar[tuple[TeacherKind, ...]] = ANY_TEACHER

    overlong: Literal["keep", "mask"] = Field(
        "keep", description="Responses cut at the length limit: distil on them, or mask them out of the loss."
    )
    distill: DivergenceConfig = Field(
        default_factory=lambda: DivergenceConfig(coefficient=1.0, tail="bucket", top_k=100),
        description="The divergence and its weight.",
    )

    def errors(self, context: RecipeContext) -> Iterator[str]:
        """Yield why the divergence cannot be computed."""
        yield from self.distill.errors(context.vocab_size)


class Distillation(BaseObjective):
    """Distillation on student samples. A method defines `teacher_context`, and `is_trained` if that can be missing."""

    config: StudentDistillationConfig

    @property
    def loss(self) -> LossSpec:
        """Return the divergence; no example has a surrogate."""
        return LossSpec(SurrogateConfig(), self.config.distill, self.temperature)

    def teacher_context(self, group: Group, index: int) -> np.ndarray | None:
        """Return the teacher's prompt ids, int32 [P], for a student sample; None masks the sample."""
        raise NotImplementedError

    def is_trained(self, group: Group, index: int) -> bool:
        """Return whether the sample has tokens and is not masked for its length."""
        return super().is_trained(group, index) and not is_masked(group.samples[index], self.config.overlong)

    def has_signal(self, group: Group) -> bool:
        """Return whether any sample of the group is distilled."""
        return any(True for _ in self.trained([group]))

    def scorings(self, groups: Sequence[Group]) -> list[Scoring]:
        """Return the teacher's scoring of each distilled sample.

        With an importance cap and several updates per step, also the policy's before the first update.
        """
        return [scoring for key, group, sample in self.trained(groups) for scoring in self._score(key, group, sample)]

    def _score(self, key: SampleKey, group: Group, sample: Sample) -> Iterator[Scoring]:
        context = self.teacher_context(group, key[2])
        assert context is not None
        yield from target_scorings(key, group.prompt_ids, context, sample, self.config.distill)
        yield from self._old_scoring(key, group, sample)

    def _old_scoring(self, key: SampleKey, group: Group, sample: Sample) -> Iterator[Scoring]:
        """Yield the denominators of the importance weights, where the policy moves within a step."""
        if self.updates_per_step > 1 and self.config.distill.importance_cap is not None:
            yield own_scoring(key, "old", group, sample, self.temperature)

    def examples(
        self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score], totals: Mapping[str, float] = NO_TOTALS
    ) -> list[Example]:
        """Return one example per distilled sample, every token with weight 1."""
        return [
            sample_distillation(key, group, sample, target_of(key, scores, self.config.distill), scores)
            for key, group, sample in self.trained(groups)
        ]

    @property
    def headlines(self) -> Sequence[Headline]:
        """Return the divergence, the entropy, the share of cliffs, and how much of the teacher is seen."""
        return (DIVERGENCE, DISTILLED_ENTROPY, CLIFF_RATE, COVERED_MASS, GRADIENT_NORM, SOLVED_RATE)

    def counts(self, groups: Sequence[Group]) -> dict[str, float]:
        """Return the number of distilled samples."""
        return {"trained": float(sum(1 for _ in self.trained(groups)))}

    def metrics(self, groups: Sequence[JudgedGroup], counts: Mapping[str, float] = NO_TOTALS) -> dict[str, float]:
        """Return the shares of solved, mixed and cliff groups, and of masked samples."""
        samples = sum(len(group.samples) for group in groups)
        return self.shares(groups) | ({"distill/masked_share": 1 - counts["trained"] / samples} if samples else {})


class SamePromptDistillation(Distillation):
    """Distillation from a teacher that reads the student's prompt."""

    def teacher_context(self, group: Group, index: int) -> np.ndarray:
        """Return the student's prompt, int32 [P]."""
        return group.prompt_ids
