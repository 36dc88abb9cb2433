"""GRPO: the group's rewards are the baseline, each response's advantage is shared by its tokens.

Shao et al. 2024; advantages by leave-one-out as in HDPO (arXiv 2603.23871, Algorithm 1 and Table 2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from megatron_hdpo.objectives.advantages import AdvantageKind, advantages
from megatron_hdpo.objectives.base import NO_TOTALS, BaseObjective
from megatron_hdpo.objectives.interface import (
    Example,
    LossSpec,
    Score,
    Scoring,
    ScoringKey,
    SurrogateConfig,
)
from megatron_hdpo.rollout.types import Group, Sample

OverlongPolicy = Literal["keep", "mask", "penalise"]


class GRPOConfig(BaseModel):
    """Group-relative policy optimisation."""

    model_config = ConfigDict(extra="forbid")

    name: Literal["grpo"] = "grpo"
    advantage: AdvantageKind = Field("leave_one_out", description="Baseline and scale of the advantages.")
    overlong: OverlongPolicy = Field(
        "keep",
        description="Responses cut at the length limit: train on them as they are, mask them out of the loss, or take "
        "overlong_penalty off their reward before advantages are computed.",
    )
    overlong_penalty: float = Field(0.5, ge=0, description="Penalty of a cut response, for overlong=penalise.")
    surrogate: SurrogateConfig = Field(default_factory=SurrogateConfig, description="The clipped surrogate.")


def student_example(group: Group, sample: Sample, advantage: float, score: Score | None, overlong: str) -> Example:
    """The example of one student rollout: the same advantage at each of its tokens, every token counts once."""
    length = sample.length
    masked = overlong == "mask" and sample.completion.finish_reason == "length"
    return Example(
        prompt_ids=group.prompt_ids,
        response_ids=sample.completion.token_ids,
        advantages_T=np.full(length, advantage, dtype=np.float32),
        surrogate_weights_T=np.full(length, 0.0 if masked else 1.0, dtype=np.float32),
        surrogate_count=0.0 if masked else float(length),
        old_logprobs_T=None if score is None else score.logprobs_T,
        rollout_logprobs_T=sample.completion.logprobs,
    )


class GRPO(BaseObjective):
    """See GRPOConfig. updates_per_step > 1 asks for the policy's own log-probs before the first update."""

    def __init__(self, config: GRPOConfig, temperature: float, updates_per_step: int = 1) -> None:
        self.config = config
        self.updates_per_step = updates_per_step
        self.temperature = temperature

    @property
    def loss(self) -> LossSpec:
        """The surrogate alone."""
        return LossSpec(self.config.surrogate, None, self.temperature)

    def has_signal(self, group: Group) -> bool:
        """Whether any rollout has an advantage."""
        return bool(np.any(self._advantages(group)))

    def scorings(self, groups: Sequence[Group]) -> list[Scoring]:
        """The denominators of the ratio, needed only when the policy moves within a step."""
        if self.updates_per_step == 1:
            return []
        return [
            Scoring(
                (g, "student", s, "old"),
                group.prompt_ids,
                sample.completion.token_ids,
                "policy",
                temperature=self.temperature,
            )
            for g, group in enumerate(groups)
            for s, sample in enumerate(group.samples)
        ]

    def examples(
        self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score], totals: Mapping[str, float] = NO_TOTALS
    ) -> list[Example]:
        """One example per student rollout."""
        examples = []
        for g, group in enumerate(groups):
            values = self._advantages(group)
            for s, sample in enumerate(group.samples):
                score = scores.get((g, "student", s, "old"))
                examples.append(student_example(group, sample, float(values[s]), score, self.config.overlong))
        return examples

    def _advantages(self, group: Group) -> np.ndarray:
        return advantages(np.array([self._reward(sample) for sample in group.samples]), self.config.advantage)

    def _reward(self, sample: Sample) -> float:
        cut = self.config.overlong == "penalise" and sample.completion.finish_reason == "length"
        return sample.reward - (self.config.overlong_penalty if cut else 0.0)

    def metrics(self, groups: Sequence[Group]) -> dict[str, float]:
        """Shares of groups that are solved (all right), cliffs (all wrong) and mixed (the only ones with signal)."""
        return group_shares(groups)


def group_shares(groups: Sequence[Group], success: float = 1.0) -> dict[str, float]:
    """Shares of solved, mixed and cliff groups among those with a judged rollout; empty when there is none."""
    judged = [[s.reward >= success for s in group.samples] for group in groups if group.samples]
    if not judged:
        return {}
    solved = sum(all(group) for group in judged) / len(judged)
    cliffs = sum(not any(group) for group in judged) / len(judged)
    return {"rollout/solved_rate": solved, "rollout/cliff_rate": cliffs, "rollout/mixed_rate": 1 - solved - cliffs}
