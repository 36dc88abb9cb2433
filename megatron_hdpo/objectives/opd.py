"""OPD: on-policy distillation by reverse KL to a teacher on the student's own tokens.

The objective is sum_t KL(q(. | s_t) || p(. | s_t)) over states that the student reaches, with the myopic gradient
(gamma 0): the effect of a token on later states is left out. Three estimators:

    single_sample   the advantage of a token is ln p - ln q of before the update, detached, in the surrogate: unbiased,
                    one number per token (Thinking Machines, "On-policy distillation", 2025)
    full            KL(q || p) over the whole vocabulary as a loss (the teacher's head is on the GPU in the update)
    top_k           the divergence on the top k of either side, by distill.tail

Both log-probs of the single sample are at the temperature of the rollouts, so of the distribution that was sampled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from megatron_hdpo.objectives.base import NO_TOTALS, BaseObjective, ObjectiveDeps
from megatron_hdpo.objectives.distillation import SamePromptDistillation, StudentDistillationConfig
from megatron_hdpo.objectives.examples import SampleKey, is_masked, own_scoring, student_example
from megatron_hdpo.objectives.settings import OTHER_TEACHERS, ObjectiveSettings, RecipeContext, TeacherKind
from megatron_hdpo.types.headline import CLIFF_RATE, ENTROPY, GRADIENT_NORM, SOLVED_RATE, Headline
from megatron_hdpo.types.learning import (
    DivergenceConfig,
    Example,
    LossSpec,
    Objective,
    Score,
    Scoring,
    ScoringKey,
    SurrogateConfig,
)
from megatron_hdpo.types.rollouts import Group, JudgedGroup, Sample

_SAMPLED_KL = Headline("distill/sampled_kl", "KL", "Sampled KL(student || teacher) (nats per token)", ".4f")


class ClampConfig(BaseModel):
    """Bounds on the log-probs and the log-ratio of a sampled token."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    logprob: float | None = Field(None, lt=0, description="Lower bound of the log-probs of either side.")
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


class OPDConfig(SampledConfig, StudentDistillationConfig):
    """On-policy distillation."""

    name: Literal["opd"] = "opd"
    estimator: Literal["single_sample", "full", "top_k"] = Field(
        "single_sample", description="What the loss compares: the sampled token, the whole vocabulary, or the top k."
    )
    distill: DivergenceConfig = Field(
        default_factory=lambda: DivergenceConfig(coefficient=1.0, kind="reverse_kl", tail="bucket", support="student"),
        description="The divergence of estimators full and top_k; full is over the vocabulary whatever its support.",
    )

    def errors(self, context: RecipeContext) -> Iterator[str]:
        """Yield why the divergence cannot be computed, or which other estimator computes it."""
        if self.estimator == "top_k":
            yield from self.distill.errors(context.vocab_size)
            if self.distill.support == "full":
                yield "distill.support: full is what estimator=full does; set objective.estimator=full"


def build_opd(config: OPDConfig, deps: ObjectiveDeps) -> Objective:
    """Return the objective for the estimator that the config names."""
    if config.estimator == "single_sample":
        return SampledDistillation(config, deps)
    if config.estimator == "full":
        full = config.distill.model_copy(update={"support": "full"})
        config = config.model_copy(update={"distill": full})
    return SamePromptDistillation(config, deps)


class SampledDistillation(BaseObjective):
    """Distillation by advantages: a token's is log-prob of the teacher less the student's, less a baseline.

    A subclass may give the baseline. All of it is constant in the loss.
    """

    config: SampledConfig

    @property
    def loss(self) -> LossSpec:
        """Return the surrogate; there is no divergence."""
        return LossSpec(self.config.surrogate, None, self.temperature)

    def is_trained(self, group: Group, index: int) -> bool:
        """Return whether the sample has tokens and is not masked for its length."""
        return super().is_trained(group, index) and not is_masked(group.samples[index], self.config.overlong)

    def has_signal(self, group: Group) -> bool:
        """Return whether any sample of the group is trained."""
        return any(True for _ in self.trained([group]))

    def scorings(self, groups: Sequence[Group]) -> list[Scoring]:
        """Return the student's and the teacher's scoring of every trained sample."""
        return [scoring for key, group, sample in self.trained(groups) for scoring in self.sides(key, group, sample)]

    def sides(self, key: SampleKey, group: Group, sample: Sample) -> tuple[Scoring, Scoring]:
        """Return the student's scoring, named `old`, and the teacher's."""
        prompt, ids = group.prompt_ids, sample.completion.token_ids
        return (
            own_scoring(key, "old", group, sample, self.temperature),
            Scoring((*key, "teacher"), prompt, ids, "teacher", temperature=self.temperature),
        )

    def examples(
        self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score], totals: Mapping[str, float] = NO_TOTALS
    ) -> list[Example]:
        """Return one example per trained sample; every token counts once."""
        return [
            student_example(
                group,
                sample,
                self.log_ratio(key, scores) - self.baseline(key, scores),
                old=scores[*key, "old"] if self.updates_per_step > 1 else None,
            )
            for key, group, sample in self.trained(groups)
        ]

    def log_ratio(self, key: SampleKey, scores: Mapping[ScoringKey, Score]) -> np.ndarray:
        """Return ln p - ln q of the sampled tokens, float64 [T], after the clamps."""
        clamp = self.config.clamp
        student, teacher = (scores[*key, side].logprobs_T.astype(np.float64) for side in ("old", "teacher"))
        if clamp.logprob is not None:
            student, teacher = np.maximum(student, clamp.logprob), np.maximum(teacher, clamp.logprob)
        bound = np.inf if clamp.log_ratio is None else clamp.log_ratio
        return np.clip(teacher - student, -bound, bound)

    def baseline(self, key: SampleKey, scores: Mapping[ScoringKey, Score]) -> np.ndarray:
        """Return the expected log-ratio, float64 [T] or a scalar. Default: 0."""
        return np.zeros(())

    def totals(self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score]) -> dict[str, float]:
        """Return sums over tokens: their number, the log-ratio, its square, and the square of the advantage."""
        ratios = [self.log_ratio(key, scores) for key, _, _ in self.trained(groups)]
        baselines = [self.baseline(key, scores) for key, _, _ in self.trained(groups)]
        pairs = list(zip(ratios, baselines, strict=True))
        return {
            "tokens": float(sum(len(ratio) for ratio in ratios)),
            "log_ratio": float(sum(ratio.sum() for ratio in ratios)),
            "squared": float(sum(np.square(ratio).sum() for ratio in ratios)),
            "squared_less_baseline": float(sum(np.square(ratio - base).sum() for ratio, base in pairs)),
        }

    def totals_metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Return the sampled estimate of KL(q || p) per token."""
        count = totals["tokens"]
        return {"distill/sampled_kl": -totals["log_ratio"] / count} if count else {}

    @property
    def headlines(self) -> Sequence[Headline]:
        """Return the divergence, entropy and the share of cliffs."""
        return (_SAMPLED_KL, ENTROPY, CLIFF_RATE, GRADIENT_NORM, SOLVED_RATE)

    def metrics(self, groups: Sequence[JudgedGroup], counts: Mapping[str, float] = NO_TOTALS) -> dict[str, float]:
        """Return the shares of solved, mixed and cliff groups, for the record: the method learns from no reward."""
        return self.shares(groups)
