"""Distillation on the student's own rollouts: what OPSD and its kin answer alike.

L = coefficient * (1/N) sum_t v_t D(teacher(. | its own context, y_<t), q(. | x, y_<t)) over the tokens of the rollouts,
the gradient through q only. A method says which context the teacher reads before a rollout; a rollout without one is
masked out: it has no loss and does not count in N.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from megatron_hdpo.objectives.base import NO_TOTALS, BaseObjective
from megatron_hdpo.objectives.grpo import group_shares
from megatron_hdpo.objectives.hdpo import distillation_example
from megatron_hdpo.objectives.settings import ANY_TEACHER, ObjectiveSettings, Surroundings, TeacherKind
from megatron_hdpo.objectives.siblings import PrivilegedPrompts
from megatron_hdpo.objectives.targets import Place, experts_of, own_scoring, target_of, target_scorings
from megatron_hdpo.types.learning import (
    DistillConfig,
    Example,
    HiddenStates,
    LossSpec,
    Score,
    Scoring,
    ScoringKey,
    SurrogateConfig,
)
from megatron_hdpo.types.rollouts import Group, Sample, TopLogprobs


class DistillationConfig(ObjectiveSettings):
    """Keys of methods that distil on the student's own rollouts and have no reward in their loss."""

    teachers: ClassVar[tuple[TeacherKind, ...]] = ANY_TEACHER

    overlong: Literal["keep", "mask"] = Field(
        "keep", description="Responses cut at the length limit: distil on them, or mask them out of the loss."
    )
    distill: DistillConfig = Field(
        default_factory=lambda: DistillConfig(coefficient=1.0, tail="bucket", top_k=100),
        description="The divergence and its weight.",
    )

    def errors(self, around: Surroundings) -> Iterator[str]:
        """A divergence that cannot be computed."""
        yield from self.distill.errors(around.vocab_size)


class Distillation(BaseObjective):
    """See the module. prompts: makes the teacher's contexts. A method defines `teacher_context`."""

    def __init__(
        self, config: DistillationConfig, temperature: float, prompts: PrivilegedPrompts, updates_per_step: int = 1
    ) -> None:
        self.config = config
        self.temperature = temperature
        self.prompts = prompts
        self.updates_per_step = updates_per_step

    @property
    def loss(self) -> LossSpec:
        """The divergence; no example has a surrogate."""
        return LossSpec(SurrogateConfig(), self.config.distill, self.temperature)

    def teacher_context(self, group: Group, index: int) -> np.ndarray | None:
        """Prompt ids of the teacher for a sample; None masks the sample."""
        raise NotImplementedError

    def is_trained(self, group: Group, index: int) -> bool:
        """Whether the sample is distilled on; a method narrows it where its context can be missing."""
        sample = group.samples[index]
        cut = self.config.overlong == "mask" and sample.completion.finish_reason == "length"
        return sample.length > 0 and not cut

    def has_signal(self, group: Group) -> bool:
        """Whether any rollout is distilled on."""
        return any(self.is_trained(group, s) for s in range(len(group.samples)))

    def scorings(self, groups: Sequence[Group]) -> list[Scoring]:
        """The teacher's distribution at each token of each rollout that is distilled on; with an importance cap and
        several updates also the policy's log-probs before the first."""
        return [scoring for place, group, sample in self.trained(groups) for scoring in self._of(place, group, sample)]

    def _of(self, place: Place, group: Group, sample: Sample) -> Iterator[Scoring]:
        context = self.teacher_context(group, place[2])
        assert context is not None
        yield from target_scorings(place, group.prompt_ids, context, sample, self.config.distill)
        if self.updates_per_step > 1 and self.config.distill.importance_cap is not None:
            yield own_scoring(place, "old", group, sample, self.temperature)

    def examples(
        self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score], totals: Mapping[str, float] = NO_TOTALS
    ) -> list[Example]:
        """One example per rollout that is distilled on, every token with weight 1."""
        return [
            student_distillation(place, group, sample, target_of(place, scores, self.config.distill), scores)
            for place, group, sample in self.trained(groups)
        ]

    def metrics(self, groups: Sequence[Group]) -> dict[str, float]:
        """Shares of kinds of groups, and of the rollouts that are masked."""
        samples = sum(len(group.samples) for group in groups)
        trained = sum(1 for _ in self.trained(groups))
        return group_shares(groups) | ({"distill/masked_share": 1 - trained / samples} if samples else {})

    def trained(self, groups: Sequence[Group]) -> Iterator[tuple[Place, Group, Sample]]:
        """The rollouts that are distilled on, with their places."""
        for g, group in enumerate(groups):
            for s, sample in enumerate(group.samples):
                if self.is_trained(group, s):
                    yield (g, "student", s), group, sample


def student_distillation(
    place: Place,
    group: Group,
    sample: Sample,
    target: TopLogprobs | HiddenStates | None,
    scores: Mapping[ScoringKey, Score],
    weights_T: np.ndarray | None = None,
) -> Example:
    """The distillation example of a student rollout, with the log-probs that an importance cap needs; weights_T [T], by
    default 1. Raises ValueError without a target."""
    if target is None:
        raise ValueError(f"problem {group.problem.id}: there is no score for rollout {place[2]}")
    example, old = distillation_example(group, sample, target), scores.get((*place, "old"))
    return replace(
        example,
        distill_weights_T=example.distill_weights_T if weights_T is None else weights_T.astype(np.float32),
        old_logprobs_T=None if old is None else old.logprobs_T,
        rollout_logprobs_T=sample.completion.logprobs,
        routed_experts=experts_of(place, sample),
    )
