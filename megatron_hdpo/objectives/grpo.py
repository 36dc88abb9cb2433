"""GRPO: the group's rewards are the baseline, each response's advantage is shared by its tokens.

Shao et al. 2024; advantages by leave-one-out as in HDPO (arXiv 2603.23871, Algorithm 1 and Table 2). Its descendants
are options: DAPO (clip_high above clip_low, aggregation=token, groups without signal sampled anew), GSPO
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
from megatron_hdpo.objectives.settings import ObjectiveSettings
from megatron_hdpo.objectives.targets import Place, own_scoring
from megatron_hdpo.types.learning import (
    Example,
    LossSpec,
    Score,
    Scoring,
    ScoringKey,
    SurrogateConfig,
)
from megatron_hdpo.types.rollouts import Group, Sample

OverlongPolicy = Literal["keep", "mask", "penalise"]


class KLConfig(BaseModel):
    """The penalty for leaving the model as reinforcement learning found it."""

    model_config = ConfigDict(extra="forbid")

    coefficient: float = Field(
        0.0, ge=0, description="Weight of half the squared log-ratio to the reference (k2) per token; 0: no reference."
    )


class GRPOConfig(ObjectiveSettings):
    """Group-relative policy optimisation."""

    name: Literal["grpo"] = "grpo"
    advantage: AdvantageKind = Field("leave_one_out", description="Baseline and scale of the advantages.")
    overlong: OverlongPolicy = Field(
        "keep",
        description="Responses cut at the length limit: train on them as they are, mask them out of the loss, or take "
        "overlong_penalty off their reward before advantages are computed.",
    )
    overlong_penalty: float = Field(0.5, ge=0, description="Penalty of a cut response, for overlong=penalise.")
    aggregation: Literal["token", "sequence"] = Field(
        "token", description="Mean of the loss over all tokens of the step, or over sequences of each one's token mean."
    )
    surrogate: SurrogateConfig = Field(default_factory=SurrogateConfig, description="The clipped surrogate.")
    kl: KLConfig = Field(default_factory=KLConfig, description="The penalty for leaving the reference.")

    @property
    def needs_reference(self) -> bool:
        """For the KL penalty."""
        return self.kl.coefficient > 0


def student_example(
    group: Group,
    sample: Sample,
    advantages: float | np.ndarray,
    config: GRPOConfig,
    old: Score | None = None,
    reference: Score | None = None,
) -> Example:
    """The example of one student rollout: one advantage for all its tokens, or one each [T]. Masked rollouts count
    nothing; others count their tokens, or 1 with a mean over sequences."""
    length = sample.length
    counts = length > 0 and not is_masked(sample, config)
    by_sequence = config.aggregation == "sequence"
    weight = 0.0 if not counts else 1.0 / length if by_sequence else 1.0
    return Example(
        prompt_ids=group.prompt_ids,
        response_ids=sample.completion.token_ids,
        advantages_T=np.broadcast_to(np.asarray(advantages, dtype=np.float32), (length,)),
        surrogate_weights_T=np.full(length, weight, dtype=np.float32),
        surrogate_count=0.0 if not counts else 1.0 if by_sequence else float(length),
        old_logprobs_T=None if old is None else old.logprobs_T,
        rollout_logprobs_T=sample.completion.logprobs,
        reference_logprobs_T=None if reference is None else reference.logprobs_T,
        routed_experts=sample.completion.routed_experts,
    )


def is_masked(sample: Sample, config: GRPOConfig) -> bool:
    """Whether the rollout was cut and cut ones are left out of the loss."""
    return config.overlong == "mask" and sample.completion.finish_reason == "length"


class GRPO(BaseObjective):
    """See GRPOConfig. updates_per_step > 1 asks for the policy's own log-probs before the first update."""

    def __init__(self, config: GRPOConfig, temperature: float, updates_per_step: int = 1) -> None:
        self.config = config
        self.updates_per_step = updates_per_step
        self.temperature = temperature

    @property
    def loss(self) -> LossSpec:
        """The surrogate and the penalty."""
        return LossSpec(self.config.surrogate, None, self.temperature, self.config.kl.coefficient)

    def has_signal(self, group: Group) -> bool:
        """Whether any rollout that is trained on has an advantage. A KL penalty is no signal: it teaches nothing."""
        trained = [sample.length > 0 and not is_masked(sample, self.config) for sample in group.samples]
        return bool(np.any(self._advantages(group) * trained))

    def scorings(self, groups: Sequence[Group]) -> list[Scoring]:
        """The denominators of the ratio, needed only when the policy moves within a step; the reference's log-probs,
        needed only for the penalty."""
        return [
            scoring
            for g, group in enumerate(groups)
            for s, sample in enumerate(group.samples)
            for scoring in self._sample_scorings((g, "student", s), group, sample)
        ]

    def _sample_scorings(self, place: Place, group: Group, sample: Sample) -> Iterator[Scoring]:
        ids = sample.completion.token_ids
        if self.updates_per_step > 1:
            yield own_scoring(place, "old", group, sample, self.temperature)
        if self.config.needs_reference and not is_masked(sample, self.config):
            yield Scoring((*place, "reference"), group.prompt_ids, ids, "reference", temperature=self.temperature)

    def examples(
        self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score], totals: Mapping[str, float] = NO_TOTALS
    ) -> list[Example]:
        """One example per student rollout."""
        examples = []
        for g, group in enumerate(groups):
            values = self._advantages(group)
            for s, sample in enumerate(group.samples):
                old, reference = (scores.get((g, "student", s, name)) for name in ("old", "reference"))
                examples.append(student_example(group, sample, float(values[s]), self.config, old, reference))
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
