"""OPD: on-policy distillation, reverse KL to a teacher on the student's own tokens.

The objective is sum_t KL(q(. | s_t) || p(. | s_t)) over states that the student reaches, with the myopic gradient
(gamma 0): how a token changes later states is left out. Three estimators:

    single_sample   the advantage of a token is ln p - ln q of before the update, detached, in the surrogate: unbiased,
                    one number per token (Thinking Machines, "On-policy distillation", 2025)
    full            KL(q || p) over the whole vocabulary as a loss (the teacher's head is at hand during the update)
    top_k           the divergence on the top k of either side, by distill.tail

Both log-probs of the single sample are at the rollouts' temperature: those are of the distribution that was sampled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from megatron_hdpo.objectives.base import NO_TOTALS, BaseObjective
from megatron_hdpo.objectives.distillation import Distillation, DistillationConfig
from megatron_hdpo.objectives.grpo import group_shares
from megatron_hdpo.objectives.settings import OTHER_TEACHERS, ObjectiveSettings, Surroundings, TeacherKind
from megatron_hdpo.objectives.targets import Place, own_scoring
from megatron_hdpo.types.learning import (
    DistillConfig,
    Example,
    LossSpec,
    Objective,
    Score,
    Scoring,
    ScoringKey,
    SurrogateConfig,
)
from megatron_hdpo.types.rollouts import Group, Sample


class ClampConfig(BaseModel):
    """Bounds on what a single sampled token can say."""

    model_config = ConfigDict(extra="forbid")

    logprob: float | None = Field(None, lt=0, description="Log-probs of either side below this count as this.")
    log_ratio: float | None = Field(
        None, gt=0, description="The difference of teacher's and student's log-prob is kept within plus and minus this."
    )


class SampledConfig(ObjectiveSettings):
    """Keys of methods that learn from the teacher's log-prob of the sampled token."""

    teachers: ClassVar[tuple[TeacherKind, ...]] = OTHER_TEACHERS

    overlong: Literal["keep", "mask"] = Field(
        "keep", description="Responses cut at the length limit: learn from them, or mask them out of the loss."
    )
    clamp: ClampConfig = Field(default_factory=ClampConfig, description="Bounds on a token's log-ratio.")
    surrogate: SurrogateConfig = Field(
        default_factory=SurrogateConfig, description="The clipped surrogate of the single sample's advantages."
    )


class OPDConfig(SampledConfig, DistillationConfig):
    """On-policy distillation."""

    name: Literal["opd"] = "opd"
    estimator: Literal["single_sample", "full", "top_k"] = Field(
        "single_sample", description="What of the two distributions enters the loss."
    )
    distill: DistillConfig = Field(
        default_factory=lambda: DistillConfig(coefficient=1.0, kind="reverse_kl", tail="bucket", support="student"),
        description="The divergence of estimators full and top_k; full is over the vocabulary whatever its support.",
    )

    def errors(self, around: Surroundings) -> Iterator[str]:
        """A divergence that cannot be computed, or that another estimator computes."""
        if self.estimator == "top_k":
            yield from self.distill.errors(around.vocab_size)
            if self.distill.support == "full":
                yield "distill.support: full is what estimator=full does; set objective.estimator=full"


def build_opd(config: OPDConfig, temperature: float, updates_per_step: int = 1) -> Objective:
    """The objective for the estimator that the config names."""
    if config.estimator == "single_sample":
        return SampledDistillation(config, temperature, updates_per_step)
    if config.estimator == "full":
        full = config.distill.model_copy(update={"support": "full"})
        config = config.model_copy(update={"distill": full})
    return SamePromptDistillation(config, temperature, updates_per_step)


class SamePromptDistillation(Distillation):
    """A divergence to a teacher that reads the student's prompt."""

    def __init__(self, config: DistillationConfig, temperature: float, updates_per_step: int = 1) -> None:
        self.config = config
        self.temperature = temperature
        self.updates_per_step = updates_per_step

    def teacher_context(self, group: Group, index: int) -> np.ndarray:
        """The student's prompt."""
        return group.prompt_ids


class SampledDistillation(BaseObjective):
    """The advantage of each token is what the teacher's log-prob of it exceeds the student's by, less a baseline, which
    a subclass may give. All of it is constant in the loss."""

    def __init__(self, config: SampledConfig, temperature: float, updates_per_step: int = 1) -> None:
        self.config = config
        self.temperature = temperature
        self.updates_per_step = updates_per_step

    @property
    def loss(self) -> LossSpec:
        """The surrogate alone."""
        return LossSpec(self.config.surrogate, None, self.temperature)

    def scorings(self, groups: Sequence[Group]) -> list[Scoring]:
        """Both sides' log-probs of every token that is trained on."""
        return [
            scoring for place, group, sample in self.trained(groups) for scoring in self.sides(place, group, sample)
        ]

    def sides(self, place: Place, group: Group, sample: Sample) -> tuple[Scoring, Scoring]:
        """The student's scoring, named `old`, and the teacher's."""
        prompt, ids = group.prompt_ids, sample.completion.token_ids
        return (
            own_scoring(place, "old", group, sample, self.temperature),
            Scoring((*place, "teacher"), prompt, ids, "teacher", temperature=self.temperature),
        )

    def examples(
        self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score], totals: Mapping[str, float] = NO_TOTALS
    ) -> list[Example]:
        """One example per rollout that is trained on; every token counts once."""
        return [
            Example(
                prompt_ids=group.prompt_ids,
                response_ids=sample.completion.token_ids,
                advantages_T=(self.log_ratio(place, scores) - self.baseline(place, scores)).astype(np.float32),
                surrogate_weights_T=np.ones(sample.length, dtype=np.float32),
                surrogate_count=float(sample.length),
                old_logprobs_T=scores[*place, "old"].logprobs_T if self.updates_per_step > 1 else None,
                rollout_logprobs_T=sample.completion.logprobs,
                routed_experts=sample.completion.routed_experts,
            )
            for place, group, sample in self.trained(groups)
        ]

    def log_ratio(self, place: Place, scores: Mapping[ScoringKey, Score]) -> np.ndarray:
        """ln p - ln q of the sampled tokens [T], after the clamps."""
        clamp = self.config.clamp
        student, teacher = (scores[*place, side].logprobs_T.astype(np.float64) for side in ("old", "teacher"))
        if clamp.logprob is not None:
            student, teacher = np.maximum(student, clamp.logprob), np.maximum(teacher, clamp.logprob)
        bound = np.inf if clamp.log_ratio is None else clamp.log_ratio
        return np.clip(teacher - student, -bound, bound)

    def baseline(self, place: Place, scores: Mapping[ScoringKey, Score]) -> np.ndarray:
        """What the log-ratio is expected to be, [T] or a scalar: nothing here."""
        return np.zeros(())

    def totals(self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score]) -> dict[str, float]:
        """Sums over tokens of the log-ratio, of its square and of the advantage's."""
        ratios = [self.log_ratio(place, scores) for place, _, _ in self.trained(groups)]
        baselines = [self.baseline(place, scores) for place, _, _ in self.trained(groups)]
        pairs = list(zip(ratios, baselines, strict=True))
        return {
            "tokens": float(sum(len(ratio) for ratio in ratios)),
            "log_ratio": float(sum(ratio.sum() for ratio in ratios)),
            "squared": float(sum(np.square(ratio).sum() for ratio in ratios)),
            "squared_less_baseline": float(sum(np.square(ratio - base).sum() for ratio, base in pairs)),
        }

    def totals_metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """The sampled estimate of KL(q || p) per token."""
        count = totals["tokens"]
        return {"distill/sampled_kl": -totals["log_ratio"] / count} if count else {}

    def has_signal(self, group: Group) -> bool:
        """Whether any rollout is trained on."""
        return any(True for _ in self.trained([group]))

    def trained(self, groups: Sequence[Group]) -> Iterator[tuple[Place, Group, Sample]]:
        """The rollouts that are trained on, with their places."""
        for g, group in enumerate(groups):
            for s, sample in enumerate(group.samples):
                masked = self.config.overlong == "mask" and sample.completion.finish_reason == "length"
                if sample.length and not masked:
                    yield (g, "student", s), group, sample

    def metrics(self, groups: Sequence[Group]) -> dict[str, float]:
        """Shares of kinds of groups, for the record: no reward is learned from."""
        return group_shares(groups)
