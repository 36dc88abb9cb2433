"""SRPO: distillation on wrong samples with a demonstration, policy gradient on all others.

arXiv 2604.02288. With c = 1 for a right rollout (by its reward, not by the sign of its advantage) and m = 1 for one
with a demonstration, z = (1 - c) m = 1 sends it to SDPO's loss, else to GRPO's. A distilled token has the weight w =
exp(-b H) with H the teacher's entropy, normalised to mean 1 over all distilled tokens of the step, and

    L = (sum of GRPO's token losses + sum of w * SDPO's token losses) / number of all tokens, of both kinds.

So every example counts in both normalisers. A group that failed as a whole without feedback has no signal.
Advantages are without a std, over the whole group. Left open by the paper and decided here: the entropy is of the full
distribution at the temperature of the divergence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from megatron_hdpo.objectives.advantages import AdvantageKind
from megatron_hdpo.objectives.base import NO_TOTALS
from megatron_hdpo.objectives.demonstrations import (
    DemonstrationConfig,
    demonstration,
    demonstration_counts,
    demonstration_shares,
    sdpo_divergence,
)
from megatron_hdpo.objectives.examples import (
    SampleKey,
    sample_distillation,
    student_samples,
    target_of,
    target_scorings,
)
from megatron_hdpo.objectives.grpo import GRPO, GRPOConfig
from megatron_hdpo.objectives.settings import EMA, OWN_TEACHERS, RecipeContext, TeacherKind, TeacherSection
from megatron_hdpo.types.headline import DIVERGENCE, Headline
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

_DISTILLED = Headline("srpo/distilled_share", "dist.", "Share of samples that are distilled")


class SRPOConfig(GRPOConfig):
    """GRPO with failures routed to self-distillation."""

    teachers: ClassVar[tuple[TeacherKind, ...]] = OWN_TEACHERS
    default_teacher: ClassVar[TeacherSection | None] = EMA

    name: Literal["srpo"] = "srpo"  # type: ignore[assignment]
    advantage: AdvantageKind = Field("rloo", description="Baseline and scale of the advantages.")
    surrogate: SurrogateConfig = Field(
        default_factory=lambda: SurrogateConfig(clip_high=0.28), description="The clipped surrogate."
    )
    demonstration: DemonstrationConfig = Field(
        default_factory=lambda: DemonstrationConfig(sources=["sibling"]),
        description="What the teacher reads in addition to the problem.",
    )
    distill: DivergenceConfig = Field(default_factory=sdpo_divergence, description="The divergence and its weight.")
    entropy_scale: float = Field(1.0, ge=0, description="b in the weight exp(-b H) of a distilled token; 0: all equal.")

    @property
    def hint_shows(self) -> frozenset[str]:
        """Return the variables that the hint template must contain."""
        return self.demonstration.shows

    def errors(self, context: RecipeContext) -> Iterator[str]:
        """Yield why the divergence cannot be computed, or why the mean has no joint normaliser."""
        yield from super().errors(context)
        yield from self.distill.errors(context.vocab_size)
        if self.aggregation != "token":
            yield f"aggregation: srpo divides both losses by the tokens of both; {self.aggregation} is not defined"


class SRPO(GRPO):
    """GRPO and SDPO on one normaliser; each sample is in one of the two losses."""

    config: SRPOConfig

    @property
    def loss(self) -> LossSpec:
        """Return the surrogate, its penalty and the divergence."""
        return replace(super().loss, distill=self.config.distill)

    def is_distilled(self, group: Group, index: int) -> bool:
        """Return whether the sample is wrong, trained and has a demonstration."""
        wrong = group.samples[index].correctness < self.config.demonstration.success_threshold
        trained = self.is_trained(group, index)
        return wrong and trained and demonstration(group, index, self.config.demonstration) is not None

    def has_signal(self, group: Group) -> bool:
        """Return whether any sample has an advantage or is distilled."""
        return super().has_signal(group) or any(self.is_distilled(group, s) for s in range(len(group.samples)))

    def scorings(self, groups: Sequence[Group]) -> list[Scoring]:
        """Return GRPO's scorings, and those of the distilled samples' targets."""
        scorings = super().scorings(groups)
        for key, group, sample in self._distilled(groups):
            hint = demonstration(group, key[2], self.config.demonstration)
            assert hint is not None
            context = self.hinted(group.problem, hint)
            scorings += target_scorings(key, group.prompt_ids, context, sample, self.config.distill)
        return scorings

    def totals(self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score]) -> dict[str, float]:
        """Return the sum of the weights of distilled tokens, and their number."""
        weights = [self._raw_weights(key, scores) for key, *_ in self._distilled(groups)]
        return {
            "srpo/weight": float(sum(weights_T.sum() for weights_T in weights)),
            "srpo/tokens": float(sum(map(len, weights))),
        }

    def examples(
        self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score], totals: Mapping[str, float] = NO_TOTALS
    ) -> list[Example]:
        """Return one example per student sample, in one of the two losses, counted in both normalisers."""
        distilled = {key: (group, sample) for key, group, sample in self._distilled(groups)}
        plain = super().examples(groups, scores, totals)
        examples = []
        for (key, _, _), example in zip(student_samples(groups), plain, strict=True):
            count = example.surrogate_count
            if key in distilled:
                weights_T = self._raw_weights(key, scores) * totals["srpo/tokens"] / totals["srpo/weight"]
                target = target_of(key, scores, self.config.distill)
                example = sample_distillation(key, *distilled[key], target, scores, weights_T)
            examples.append(replace(example, surrogate_count=count, distill_count=count))
        return examples

    @property
    def headlines(self) -> Sequence[Headline]:
        """Return the headlines of GRPO, the share of samples that are distilled, and their divergence."""
        first, *rest = super().headlines
        return (first, _DISTILLED, DIVERGENCE, *rest)

    def counts(self, groups: Sequence[Group]) -> dict[str, float]:
        """Return the numbers of samples with a demonstration, and of those that are distilled."""
        distilled = {"distilled": float(sum(1 for _ in self._distilled(groups)))}
        return demonstration_counts(groups, self.config.demonstration) | distilled

    def metrics(self, groups: Sequence[JudgedGroup], counts: Mapping[str, float] = NO_TOTALS) -> dict[str, float]:
        """Return GRPO's metrics, the shares of samples with a demonstration, and the share that is distilled."""
        metrics = super().metrics(groups) | demonstration_shares(groups, counts)
        samples = sum(len(group.samples) for group in groups)
        return metrics | ({"srpo/distilled_share": counts["distilled"] / samples} if samples else {})

    def _distilled(self, groups: Sequence[Group]) -> Iterator[tuple[SampleKey, Group, Sample]]:
        for key, group, sample in student_samples(groups):
            if self.is_distilled(group, key[2]):
                yield key, group, sample

    def _raw_weights(self, key: SampleKey, scores: Mapping[ScoringKey, Score]) -> np.ndarray:
        """Return exp(-b H) of each token, float64 [T]."""
        return np.exp(-self.config.entropy_scale * scores[(*key, "teacher")].entropy_T.astype(np.float64))
