"""Contrastive OPSD: distillation towards a right sibling and away from a wrong one.

arXiv 2606.11709, Eqs 18 and 19. With p_c the teacher after a right sibling and p_w after a wrong one, both with the
same template, on the top k of p_c and one bucket for the rest,

    guided = softmax( (1 + a) ln p_c - a max(ln p_w, floor) ),   m_t = KL(p_c || p_w) / (KL(p_c || p_w) + t),
    L = mean over tokens of m_t KL(guided || q),

with OPSD's clip. a = 0 and t = 0 give OPSD with a sibling in place of the solution. The floor is the code's, not the
paper's. The rest is one bucket with an exponent of its own, so this differs from guidance over the whole vocabulary.
Rollouts without a right and a wrong sibling are masked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from megatron_hdpo.objectives.base import NO_TOTALS
from megatron_hdpo.objectives.distillation import Distillation, StudentDistillationConfig
from megatron_hdpo.objectives.examples import SampleKey, sample_distillation
from megatron_hdpo.objectives.settings import FROZEN, RecipeContext, TeacherSection
from megatron_hdpo.objectives.siblings import PairConfig, has_pair, pair_hints
from megatron_hdpo.types.headline import Headline
from megatron_hdpo.types.learning import DivergenceConfig, Example, Score, Scoring, ScoringKey
from megatron_hdpo.types.rollouts import Group, Sample, TopKArrays

_SMALLEST_REST = 1e-7
"""Lower bound of the bucket's mass: its logarithm must be finite."""

_WEIGHT = Headline("contrast/mean_weight", "weight", "Mean weight of a token")


class ContrastiveOPSDConfig(StudentDistillationConfig):
    """OPSD towards a right sibling and away from a wrong one."""

    default_teacher: ClassVar[TeacherSection | None] = FROZEN

    name: Literal["contrastive_opsd"] = "contrastive_opsd"
    siblings: PairConfig = Field(default_factory=PairConfig, description="Which siblings serve as hints.")
    guidance: float = Field(
        0.5, ge=0, description="a: strength with which the target moves away from the wrong sibling."
    )
    floor: float = Field(-5.0, le=0, description="Lower bound of the log-probs after the wrong sibling.")
    half_weight: float = Field(1.0, ge=0, description="t: divergence of the two teachers at which a token weighs 1/2.")
    distill: DivergenceConfig = Field(
        default_factory=lambda: DivergenceConfig(
            coefficient=1.0, kind="forward_kl", tail="bucket", top_k=100, clip=0.05
        ),
        description="The divergence and its weight.",
    )

    @property
    def hint_shows(self) -> frozenset[str]:
        """Return the variables that the hint template must contain."""
        return frozenset({"attempt"})

    def errors(self, context: RecipeContext) -> Iterator[str]:
        """Yield why the divergence cannot be computed, or does not fit the guided target."""
        yield from super().errors(context)
        if self.distill.support != "teacher":
            yield f"distill.support: the target is made on the teacher's top k, not on {self.distill.support}"
        if self.distill.tail != "bucket":
            yield f"distill.tail: the target is made with a bucket for the rest; set bucket, not {self.distill.tail}"


class ContrastiveOPSD(Distillation):
    """Distillation on a guided target; samples without a right and a wrong sibling are masked."""

    config: ContrastiveOPSDConfig

    def is_trained(self, group: Group, index: int) -> bool:
        """Return whether the sample has a right and a wrong sibling, and what every distillation asks for."""
        return super().is_trained(group, index) and has_pair(group, index, self.config.siblings)

    def _score(self, key: SampleKey, group: Group, sample: Sample) -> Iterator[Scoring]:
        """Yield the teacher's top k after the right sibling, and its log-probs of these tokens after the wrong one."""
        ids, distill = sample.completion.token_ids, self.config.distill
        hints = pair_hints(group, key[2], self.config.siblings, self.step)
        first, second = (self.hinted(group.problem, hint) for hint in hints)
        right = (*key, "right")
        yield Scoring(right, first, ids, "teacher", top_k=distill.top_k, temperature=distill.temperature)
        yield Scoring((*key, "wrong"), second, ids, "teacher", temperature=distill.temperature, at=right)
        yield from self._old_scoring(key, group, sample)

    def examples(
        self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score], totals: Mapping[str, float] = NO_TOTALS
    ) -> list[Example]:
        """Return one example per trained sample, its tokens weighted by the divergence of the two teachers."""
        examples = []
        for key, group, sample in self.trained(groups):
            target, weights_T = self._guided(key, scores)
            examples.append(
                sample_distillation(
                    key=key, group=group, sample=sample, target=target, scores=scores, weights_T=weights_T
                )
            )
        return examples

    @property
    def headlines(self) -> Sequence[Headline]:
        """Return the headlines of every distillation, and the mean weight of a token."""
        first, *rest = super().headlines
        return (first, _WEIGHT, *rest)

    def totals(self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score]) -> dict[str, float]:
        """Return the sum of the tokens' weights and their number, for the metrics alone."""
        weights = [self._guided(key, scores)[1] for key, *_ in self.trained(groups)]
        return {
            "contrast/weight": float(sum(weights_T.sum() for weights_T in weights)),
            "contrast/tokens": float(sum(map(len, weights))),
        }

    def totals_metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Return the mean weight of the tokens."""
        tokens = totals["contrast/tokens"]
        return {"contrast/mean_weight": totals["contrast/weight"] / tokens} if tokens else {}

    def _guided(self, key: SampleKey, scores: Mapping[ScoringKey, Score]) -> tuple[TopKArrays, np.ndarray]:
        """Return the guided target, and m, float64 [T]."""
        right, wrong = scores[(*key, "right")], scores[(*key, "wrong")]
        assert right.top is not None and wrong.at_logprobs_TK is not None
        right_TB, wrong_TB = with_rest(right.top.logprobs_TK), with_rest(wrong.at_logprobs_TK)
        divergence_T = np.maximum((np.exp(right_TB) * (right_TB - wrong_TB)).sum(-1), 0.0)
        a, half = self.config.guidance, self.config.half_weight
        weights_T = divergence_T / (divergence_T + half) if half else np.ones_like(divergence_T)
        guided_TB = (1 + a) * right_TB - a * np.maximum(wrong_TB, self.config.floor)
        guided_TB -= np.logaddexp.reduce(guided_TB, axis=-1, keepdims=True)
        return TopKArrays(right.top.ids_TK, guided_TB[:, :-1].astype(np.float32)), weights_T


def with_rest(logprobs_TK: np.ndarray) -> np.ndarray:
    """Return log-probs float64 [T, K + 1]: those given, and that of all other tokens together."""
    logprobs = logprobs_TK.astype(np.float64)
    rest = np.maximum(1.0 - np.exp(logprobs).sum(-1, keepdims=True), _SMALLEST_REST)
    return np.concatenate([logprobs, np.log(rest)], axis=-1)
