"""SDPO: self-distillation from the model that has read a successful sibling, or feedback on the rollout.

arXiv 2601.20802: L = token mean of w_t JSD(teacher, q) over the rollouts that have such a context; the others are
masked out and do not count. w_t = min(2, q / q when sampled), detached. The divergence is on the student's top 100 and
one bucket for the rest; the teacher is an average of the policy's past weights (`teacher.kind: ema`). The sample itself
is never its own demonstration; a sibling's thinking is removed.

Where its paper and code differ: a rollout with a reward of 1 or more is right (its configuration file says 0.5); both
sources are shown where both exist.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from megatron_hdpo.data.prompts import Hint
from megatron_hdpo.objectives.base import NO_TOTALS
from megatron_hdpo.objectives.demonstrations import (
    DemonstrationConfig,
    demonstration,
    demonstration_counts,
    demonstration_shares,
    sdpo_divergence,
)
from megatron_hdpo.objectives.distillation import Distillation, StudentDistillationConfig
from megatron_hdpo.objectives.settings import EMA, OWN_TEACHERS, TeacherKind, TeacherSection
from megatron_hdpo.types.headline import Headline
from megatron_hdpo.types.learning import DivergenceConfig
from megatron_hdpo.types.rollouts import Group, JudgedGroup

_SIBLINGS = Headline("distill/sibling_share", "sibl.", "Share of samples whose teacher reads a right sibling")


class SDPOConfig(StudentDistillationConfig):
    """Self-distillation policy optimisation."""

    teachers: ClassVar[tuple[TeacherKind, ...]] = OWN_TEACHERS
    default_teacher: ClassVar[TeacherSection | None] = EMA

    name: Literal["sdpo"] = "sdpo"
    demonstration: DemonstrationConfig = Field(
        default_factory=DemonstrationConfig, description="What the teacher reads in addition to the problem."
    )
    distill: DivergenceConfig = Field(default_factory=sdpo_divergence, description="The divergence and its weight.")

    @property
    def hint_shows(self) -> frozenset[str]:
        """Return the variables that the hint template must contain."""
        return self.demonstration.shows


class SDPO(Distillation):
    """Distillation from a teacher that reads a demonstration; samples without one are masked."""

    config: SDPOConfig

    def is_trained(self, group: Group, index: int) -> bool:
        """Return whether the sample has a demonstration, and what every distillation asks for."""
        return super().is_trained(group, index) and self._hint(group, index) is not None

    def teacher_context(self, group: Group, index: int) -> np.ndarray | None:
        """Return the prompt that shows the demonstration, int32 [P]; None without one."""
        hint = self._hint(group, index)
        return None if hint is None else self.hinted(group.problem, hint)

    @property
    def headlines(self) -> Sequence[Headline]:
        """Return the headlines of every distillation, and the share of samples with a sibling."""
        first, *rest = super().headlines
        return (first, _SIBLINGS, *rest)

    def counts(self, groups: Sequence[Group]) -> dict[str, float]:
        """Return the counts of every distillation, and the numbers of samples with a sibling and with feedback."""
        return super().counts(groups) | demonstration_counts(groups, self.config.demonstration)

    def metrics(self, groups: Sequence[JudgedGroup], counts: Mapping[str, float] = NO_TOTALS) -> dict[str, float]:
        """Return the metrics of every distillation, and the shares of samples with a sibling and with feedback."""
        return super().metrics(groups, counts) | demonstration_shares(groups, counts)

    def _hint(self, group: Group, index: int) -> Hint | None:
        return demonstration(group, index, self.config.demonstration)
