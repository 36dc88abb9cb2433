"""SRPO: wrong rollouts that have a demonstration are distilled, all others learn from their advantage.

arXiv 2604.02288. With c the rollout being right, from its reward and not from the sign of its advantage, and m a
demonstration being there, z = (1 - c) m routes it to SDPO's loss, else to GRPO's. A distilled token weighs
w = exp(-b H) with H the teacher's entropy, normalised to mean 1 over all distilled tokens of the step, and

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
from megatron_hdpo.objectives.demonstrations import DemonstrationConfig, demonstration
from megatron_hdpo.objectives.distillation import student_distillation
from megatron_hdpo.objectives.grpo import GRPO, GRPOConfig, is_masked
from megatron_hdpo.objectives.sdpo import demonstration_shares, sdpo_divergence
from megatron_hdpo.objectives.settings import OWN_TEACHERS, Surroundings, TeacherKind
from megatron_hdpo.objectives.siblings import PrivilegedPrompts
from megatron_hdpo.objectives.targets import Place, target_of, target_scorings
from megatron_hdpo.types.learning import (
    DistillConfig,
    Example,
    LossSpec,
    Score,
    Scoring,
    ScoringKey,
    SurrogateConfig,
)
from megatron_hdpo.types.rollouts import Group, Sample


class SRPOConfig(GRPOConfig):
    """GRPO with failures routed to self-distillation."""

    teachers: ClassVar[tuple[TeacherKind, ...]] = OWN_TEACHERS

    name: Literal["srpo"] = "srpo"  # type: ignore[assignment]
    advantage: AdvantageKind = Field("rloo", description="Baseline and scale of the advantages.")
    surrogate: SurrogateConfig = Field(
        default_factory=lambda: SurrogateConfig(clip_high=0.28), description="The clipped surrogate."
    )
    demonstration: DemonstrationConfig = Field(
        default_factory=lambda: DemonstrationConfig(sources=["sibling"]),
        description="What the teacher reads besides the problem.",
    )
    distill: DistillConfig = Field(default_factory=sdpo_divergence, description="The divergence and its weight.")
    entropy_scale: float = Field(1.0, ge=0, description="b in the weight exp(-b H) of a distilled token; 0: all equal.")

    @property
    def hint_shows(self) -> frozenset[str]:
        """What the hint template must show."""
        return self.demonstration.shows

    def errors(self, around: Surroundings) -> Iterator[str]:
        """A divergence that cannot be computed; a mean that has no joint normaliser."""
        yield from super().errors(around)
        yield from self.distill.errors(around.vocab_size)
        if self.aggregation != "token":
            yield f"aggregation: srpo divides both losses by the tokens of both; {self.aggregation} is not defined"


class SRPO(GRPO):
    """See SRPOConfig. prompts: makes the teacher's contexts."""

    config: SRPOConfig

    def __init__(
        self, config: SRPOConfig, temperature: float, prompts: PrivilegedPrompts, updates_per_step: int = 1
    ) -> None:
        super().__init__(config, temperature, updates_per_step)
        self.prompts = prompts

    @property
    def loss(self) -> LossSpec:
        """The surrogate, its penalty and the divergence."""
        return replace(super().loss, distill=self.config.distill)

    def is_distilled(self, group: Group, index: int) -> bool:
        """Whether the sample is routed to distillation."""
        sample = group.samples[index]
        wrong = sample.reward < self.config.demonstration.success_threshold
        trained = sample.length > 0 and not is_masked(sample, self.config)
        return wrong and trained and demonstration(group, index, self.config.demonstration) is not None

    def has_signal(self, group: Group) -> bool:
        """Whether any rollout has an advantage or is distilled."""
        return super().has_signal(group) or any(self.is_distilled(group, s) for s in range(len(group.samples)))

    def scorings(self, groups: Sequence[Group]) -> list[Scoring]:
        """GRPO's, and the teacher's distribution at each token of the distilled rollouts."""
        scorings = super().scorings(groups)
        for (g, kind, s), group, sample in self._distilled(groups):
            hint = demonstration(group, s, self.config.demonstration)
            assert hint is not None
            context = self.prompts.hinted(group.problem, hint)
            scorings += target_scorings((g, kind, s), group.prompt_ids, context, sample, self.config.distill)
        return scorings

    def totals(self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score]) -> dict[str, float]:
        """Weights and number of distilled tokens."""
        weights = [self._raw_weights(place, scores) for place, *_ in self._distilled(groups)]
        return {
            "srpo/weight": float(sum(weights_T.sum() for weights_T in weights)),
            "srpo/tokens": float(sum(map(len, weights))),
        }

    def examples(
        self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score], totals: Mapping[str, float] = NO_TOTALS
    ) -> list[Example]:
        """One example per rollout, in one of the two losses, counted in both normalisers."""
        distilled = {place: (group, sample) for place, group, sample in self._distilled(groups)}
        plain = super().examples(groups, scores, totals)
        places = [(g, "student", s) for g, group in enumerate(groups) for s in range(len(group.samples))]
        examples = []
        for place, example in zip(places, plain, strict=True):
            count = example.surrogate_count
            if place in distilled:
                weights_T = self._raw_weights(place, scores) * totals["srpo/tokens"] / totals["srpo/weight"]
                target = target_of(place, scores, self.config.distill)
                example = student_distillation(place, *distilled[place], target, scores, weights_T)
            examples.append(replace(example, surrogate_count=count, distill_count=count))
        return examples

    def metrics(self, groups: Sequence[Group]) -> dict[str, float]:
        """GRPO's, shares of rollouts with a demonstration, and the share that is distilled."""
        metrics = super().metrics(groups) | demonstration_shares(groups, self.config.demonstration)
        samples = sum(len(group.samples) for group in groups)
        distilled = sum(1 for _ in self._distilled(groups))
        return metrics | ({"srpo/distilled_share": distilled / samples} if samples else {})

    def _distilled(self, groups: Sequence[Group]) -> Iterator[tuple[Place, Group, Sample]]:
        for g, group in enumerate(groups):
            for s, sample in enumerate(group.samples):
                if self.is_distilled(group, s):
                    yield (g, "student", s), group, sample

    def _raw_weights(self, place: Place, scores: Mapping[ScoringKey, Score]) -> np.ndarray:
        """exp(-b H) of each token, float64 [T]."""
        return np.exp(-self.config.entropy_scale * scores[(*place, "teacher")].entropy_T.astype(np.float64))
