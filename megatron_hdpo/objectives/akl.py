"""AKL: distillation by a mix of forward and reverse KL that adapts to where the student is off.

arXiv 2404.02657: the teacher's most likely tokens up to a mass (distill.beta) are its head, the rest its tail; with g
the sum of |p - q| over each, L = g_head / g * KL(p || q) + g_tail / g * KL(q || p), the weights constant. On the
student's own rollouts, taught by another model at the same prompt; or on the teacher's: rollouts sampled with the
privileged prompt, taught by a model that reads it too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from megatron_hdpo.objectives.distillation import Distillation, DistillationConfig
from megatron_hdpo.objectives.grpo import group_shares
from megatron_hdpo.objectives.opd import SamePromptDistillation
from megatron_hdpo.objectives.settings import Surroundings
from megatron_hdpo.objectives.targets import Place
from megatron_hdpo.types.learning import DistillConfig, Objective
from megatron_hdpo.types.rollouts import Group, Sample


class AKLConfig(DistillationConfig):
    """Adaptive KL distillation."""

    name: Literal["akl"] = "akl"
    tokens: Literal["student", "teacher"] = Field(
        "student", description="Whose rollouts are learned from: the student's, or those with the privileged prompt."
    )
    rollouts: int = Field(1, ge=1, description="Privileged rollouts per prompt, for tokens=teacher.")
    distill: DistillConfig = Field(
        default_factory=lambda: DistillConfig(coefficient=1.0, kind="akl", tail="bucket", top_k=100),
        description="The divergence (kind akl, beta the mass of the head) and its weight.",
    )

    @property
    def needs_privileged(self) -> bool:
        """For the teacher's rollouts."""
        return self.tokens == "teacher"

    def errors(self, around: Surroundings) -> Iterator[str]:
        """A divergence that cannot be computed or is another; a teacher that would agree with the student."""
        yield from super().errors(around)
        if self.distill.kind != "akl":
            yield f"distill.kind: {self.distill.kind}, but objective akl is about kind=akl"
        if self.tokens == "student" and around.teacher == "policy":
            yield (
                "tokens: student, but teacher.kind=policy agrees with the student after the same prompt; set "
                "objective.tokens=teacher or another teacher"
            )
        if self.tokens == "teacher" and self.distill.importance_cap is not None:
            yield "distill.importance_cap: the student did not sample the tokens of tokens=teacher; leave it out"


def build_akl(config: AKLConfig, temperature: float, updates_per_step: int = 1) -> Objective:
    """The objective for the tokens that the config names."""
    if config.tokens == "student":
        return SamePromptDistillation(config, temperature, updates_per_step)
    return TeacherTokens(config, temperature, updates_per_step)


class TeacherTokens(Distillation):
    """Distillation on privileged rollouts of every prompt, right or wrong: the teacher's own tokens."""

    config: AKLConfig

    def __init__(self, config: AKLConfig, temperature: float, updates_per_step: int = 1) -> None:
        self.config = config
        self.temperature = temperature
        self.updates_per_step = updates_per_step

    def privileged(self, group: Group, step: int) -> int:
        """As many for every prompt."""
        return self.config.rollouts

    def teacher_context(self, group: Group, index: int) -> np.ndarray | None:
        """The prompt that they were sampled with."""
        return group.privileged_prompt_ids

    def has_signal(self, group: Group) -> bool:
        """Whether any of them is trained on."""
        return any(True for _ in self.trained([group]))

    def trained(self, groups: Sequence[Group]) -> Iterator[tuple[Place, Group, Sample]]:
        """Privileged rollouts, with their places."""
        for g, group in enumerate(groups):
            for s, sample in enumerate(group.privileged):
                masked = self.config.overlong == "mask" and sample.completion.finish_reason == "length"
                if sample.length and not masked:
                    yield (g, "privileged", s), group, sample

    def metrics(self, groups: Sequence[Group]) -> dict[str, float]:
        """Shares of kinds of groups, and how many privileged rollouts there are."""
        return group_shares(groups) | {"privileged/kept": float(sum(len(group.privileged) for group in groups))}
