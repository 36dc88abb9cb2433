"""GRPO: policy gradient whose baseline is the mean reward of the group; a response's tokens share its advantage.

Shao et al. 2024; advantages by leave-one-out as in HDPO (arXiv 2603.23871, Algorithm 1 and Table 2). Its descendants
are options: DAPO (clip_high above clip_low, aggregation=token, groups without signal replaced), GSPO
(surrogate.ratio=sequence, aggregation=sequence), Dr. GRPO (advantage=rloo), a KL penalty.

The penalty is k2, half the squared log-ratio of policy to reference at the sampled tokens. As a loss on the policy's
own samples it alone has the gradient of KL(policy || reference): k1, ln(q/p) itself, has a gradient that is zero in
expectation, and k3, p/q - 1 - ln(p/q), has that of KL(reference || policy), though its value estimates the other one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from megatron_hdpo.objectives.advantages import AdvantageKind, advantages
from megatron_hdpo.objectives.base import NO_TOTALS, BaseObjective
from megatron_hdpo.objectives.examples import SampleKey, is_masked, own_scoring, student_example, student_samples
from megatron_hdpo.objectives.settings import ObjectiveSettings
from megatron_hdpo.types.headline import (
    CLIFF_RATE,
    CLIP_FRACTION,
    ENTROPY,
    GRADIENT_NORM,
    REFERENCE_KL,
    SOLVED_RATE,
    SURROGATE_LOSS,
    Headline,
)
from megatron_hdpo.types.learning import Example, LossSpec, Score, Scoring, ScoringKey, SurrogateConfig
from megatron_hdpo.types.rollouts import Group, JudgedGroup, JudgedSample, Sample

OverlongPolicy = Literal["keep", "mask", "penalise"]


class KLConfig(BaseModel):
    """KL penalty towards the reference: the model before reinforcement learning started."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    coefficient: float = Field(
        0.0, ge=0, description="Weight of half the squared log-ratio to the reference (k2) per token; 0: no reference."
    )


class GRPOConfig(ObjectiveSettings):
    """Group-relative policy optimisation."""

    name: Literal["grpo"] = "grpo"
    advantage: AdvantageKind = Field("leave_one_out", description="Baseline and scale of the advantages.")
    overlong: OverlongPolicy = Field(
        "keep",
        description="Responses cut at the length limit: train on them as they are, mask them out of the loss, or "
        "subtract overlong_penalty from their reward before advantages are computed (not on a cliff: it has none).",
    )
    overlong_penalty: float = Field(0.5, ge=0, description="Penalty of a cut response, for overlong=penalise.")
    aggregation: Literal["token", "sequence"] = Field(
        "token", description="Mean of the loss over all tokens of the step, or over sequences of each one's token mean."
    )
    surrogate: SurrogateConfig = Field(default_factory=SurrogateConfig, description="The clipped surrogate.")
    kl: KLConfig = Field(default_factory=KLConfig, description="The penalty for leaving the reference.")

    @property
    def needs_reference(self) -> bool:
        """Return whether there is a KL penalty."""
        return self.kl.coefficient > 0


class GRPO(BaseObjective):
    """Policy gradient with one advantage per sample; with several updates per step the policy scores itself before."""

    config: GRPOConfig

    @property
    def loss(self) -> LossSpec:
        """Return the surrogate and the penalty."""
        return LossSpec(self.config.surrogate, None, self.temperature, self.config.kl.coefficient)

    def is_trained(self, group: Group, index: int) -> bool:
        """Return whether the sample has tokens and is not masked for its length."""
        return super().is_trained(group, index) and not is_masked(group.samples[index], self.config.overlong)

    def has_signal(self, group: Group) -> bool:
        """Return whether any trained sample has an advantage. A KL penalty alone is no signal: it teaches nothing."""
        trained = [self.is_trained(group, s) for s in range(len(group.samples))]
        return bool(np.any(self._advantages(group) * trained))

    def scorings(self, groups: Sequence[Group]) -> list[Scoring]:
        """Return the policy's scorings if it moves within a step, and the reference's if there is a penalty."""
        samples = student_samples(groups)
        return [scoring for key, group, sample in samples for scoring in self._sample_scorings(key, group, sample)]

    def _sample_scorings(self, key: SampleKey, group: Group, sample: Sample) -> Iterator[Scoring]:
        ids = sample.completion.token_ids
        if self.updates_per_step > 1:
            yield own_scoring(key, "old", group, sample, self.temperature)
        if self.config.needs_reference and not is_masked(sample, self.config.overlong):
            yield Scoring((*key, "reference"), group.prompt_ids, ids, "reference", temperature=self.temperature)

    def examples(
        self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score], totals: Mapping[str, float] = NO_TOTALS
    ) -> list[Example]:
        """Return one example per student sample."""
        values = [self._advantages(group) for group in groups]
        return [
            self._example(key, group, sample, float(values[key[0]][key[2]]), scores)
            for key, group, sample in student_samples(groups)
        ]

    def _example(
        self,
        key: SampleKey,
        group: Group,
        sample: Sample,
        advantages: float | np.ndarray,
        scores: Mapping[ScoringKey, Score],
    ) -> Example:
        """Return the example of a student sample; advantages: one for all its tokens, or one each [T].

        Samples that are not trained count nothing; others count their tokens, or 1 with a mean over sequences.
        """
        counts = self.is_trained(group, key[2])
        by_sequence = self.config.aggregation == "sequence"
        return student_example(
            group,
            sample,
            advantages,
            weight=0.0 if not counts else 1.0 / sample.length if by_sequence else 1.0,
            count=0.0 if not counts else 1.0 if by_sequence else None,
            old=scores.get((*key, "old")) if self.updates_per_step > 1 else None,
            reference=scores.get((*key, "reference")),
        )

    def _advantages(self, group: JudgedGroup) -> np.ndarray:
        """Return the advantages of the samples, float64 [G].

        On a cliff they are 0, also where penalties differ, unless other reward functions than the one that decides
        tell its samples apart.
        """
        cliff = self.is_cliff(group)
        if cliff and all(sample.reward == sample.correctness for sample in group.samples):
            return np.zeros(len(group.samples))
        rewards = [sample.reward if cliff else self._reward(sample) for sample in group.samples]
        return advantages(np.array(rewards), self.config.advantage)

    def _reward(self, sample: JudgedSample) -> float:
        cut = self.config.overlong == "penalise" and sample.finish_reason == "length"
        return sample.reward - (self.config.overlong_penalty if cut else 0.0)

    @property
    def headlines(self) -> Sequence[Headline]:
        """Return the shares of cliffs and of solved prompts, entropy, and what tells of the update."""
        penalty = (REFERENCE_KL,) if self.config.needs_reference else ()
        return (CLIFF_RATE, SOLVED_RATE, ENTROPY, GRADIENT_NORM, *penalty, SURROGATE_LOSS, CLIP_FRACTION)

    def metrics(self, groups: Sequence[JudgedGroup], counts: Mapping[str, float] = NO_TOTALS) -> dict[str, float]:
        """Return the shares of solved groups (all right), cliffs (all wrong) and mixed ones."""
        return self.shares(groups)
