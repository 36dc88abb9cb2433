"""AKL: distillation by a mix of forward and reverse KL, by where student and teacher differ.

arXiv 2404.02657: the teacher's most likely tokens up to a mass (distill.beta) are its head, the rest its tail; with g
the sum of |p - q| over each, L = g_head / g * KL(p || q) + g_tail / g * KL(q || p), the weights constant. Either on the
student's own rollouts, with another model as teacher at the same prompt; or on the teacher's: rollouts sampled with the
privileged prompt, scored by a teacher that reads it too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from megatron_hdpo.objectives.base import NO_TOTALS, ObjectiveDeps
from megatron_hdpo.objectives.distillation import Distillation, SamePromptDistillation, StudentDistillationConfig
from megatron_hdpo.objectives.examples import SampleKey, is_masked, privileged_samples
from megatron_hdpo.objectives.settings import RecipeContext
from megatron_hdpo.types.headline import PRIVILEGED_KEPT, Headline
from megatron_hdpo.types.learning import DivergenceConfig, Objective
from megatron_hdpo.types.rollouts import Group, JudgedGroup, Sample


class AKLConfig(StudentDistillationConfig):
    """Adaptive KL distillation."""

    name: Literal["akl"] = "akl"
    tokens: Literal["student", "teacher"] = Field(
        "student",
        description="Train on the student's rollouts, or on the teacher's: those sampled with the privileged prompt.",
    )
    rollouts: int = Field(1, ge=1, description="Privileged rollouts per prompt, for tokens=teacher.")
    distill: DivergenceConfig = Field(
        default_factory=lambda: DivergenceConfig(coefficient=1.0, kind="akl", tail="bucket", top_k=100),
        description="The divergence (kind akl, beta the mass of the head) and its weight.",
    )

    @property
    def needs_privileged(self) -> bool:
        """Return whether the rollouts are the teacher's."""
        return self.tokens == "teacher"

    def errors(self, context: RecipeContext) -> Iterator[str]:
        """Yield why the divergence cannot be computed, or why the teacher would equal the student."""
        yield from super().errors(context)
        if self.distill.kind != "akl":
            yield f"distill.kind: {self.distill.kind}, but objective akl is about kind=akl"
        if self.tokens == "student" and context.teacher == "policy":
            yield (
                "tokens: student, but teacher.kind=policy agrees with the student after the same prompt; set "
                "objective.tokens=teacher or another teacher"
            )
        if self.tokens == "teacher" and self.distill.importance_cap is not None:
            yield "distill.importance_cap: the student did not sample the tokens of tokens=teacher; leave it out"


def build_akl(config: AKLConfig, deps: ObjectiveDeps) -> Objective:
    """Return the objective for the tokens that the config names."""
    return (SamePromptDistillation if config.tokens == "student" else TeacherTokens)(config, deps)


class TeacherTokens(Distillation):
    """Distillation on privileged samples of every prompt, right or wrong."""

    config: AKLConfig

    def privileged_rollouts_for(self, group: Group, step: int) -> int:
        """Return the same number for every group."""
        return self.config.rollouts

    def teacher_context(self, group: Group, index: int) -> np.ndarray | None:
        """Return the prompt that the privileged samples were sampled with, int32 [P]."""
        return group.privileged_prompt_ids

    def trained(self, groups: Sequence[Group]) -> Iterator[tuple[SampleKey, Group, Sample]]:
        """Yield the privileged samples that have tokens and are not masked, with key and group."""
        for key, group, sample in privileged_samples(groups):
            if sample.length and not is_masked(sample, self.config.overlong):
                yield key, group, sample

    @property
    def headlines(self) -> Sequence[Headline]:
        """Return the number of the teacher's responses, and the headlines of every distillation."""
        return (PRIVILEGED_KEPT, *super().headlines)

    def metrics(self, groups: Sequence[JudgedGroup], counts: Mapping[str, float] = NO_TOTALS) -> dict[str, float]:
        """Return the shares of solved, mixed and cliff groups, and the number of privileged samples."""
        return self.shares(groups) | {"privileged/kept": float(sum(len(group.privileged_samples) for group in groups))}
