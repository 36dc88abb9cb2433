"""Contrastive OPSD: the target leans away from what the teacher says after a wrong sibling.

arXiv 2606.11709, Eqs 18 and 19. With p_c the teacher after a right sibling and p_w after a wrong one, both under one
template, on the top k of p_c and one bucket for the rest,

    guided = softmax( (1 + a) ln p_c - a max(ln p_w, floor) ),   m_t = KL(p_c || p_w) / (KL(p_c || p_w) + t),
    L = mean over tokens of m_t KL(guided || q),

with OPSD's clip. a = 0 and t = 0 give OPSD with a sibling for the solution. The floor is the code's, not the paper's.
The rest is one bucket with an exponent of its own, so this differs from guidance over the whole vocabulary. Rollouts
without a right and a wrong sibling are masked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from megatron_hdpo.objectives.base import NO_TOTALS
from megatron_hdpo.objectives.distillation import Distillation, DistillationConfig, student_distillation
from megatron_hdpo.objectives.settings import Surroundings
from megatron_hdpo.objectives.siblings import (
    PairConfig,
    draw,
    has_pair,
    right_siblings,
    sibling_hint,
    wrong_siblings,
)
from megatron_hdpo.objectives.targets import Place, own_scoring
from megatron_hdpo.types.learning import DistillConfig, Example, Score, Scoring, ScoringKey
from megatron_hdpo.types.rollouts import Group, Sample, TopLogprobs

_SMALLEST_REST = 1e-7
"""Mass of the bucket, at least: its logarithm must be finite."""


class ContrastiveOPSDConfig(DistillationConfig):
    """OPSD towards a right sibling and away from a wrong one."""

    name: Literal["contrastive_opsd"] = "contrastive_opsd"
    siblings: PairConfig = Field(default_factory=PairConfig, description="Which siblings serve as hints.")
    guidance: float = Field(0.5, ge=0, description="a: how far the target leans away from the wrong sibling.")
    floor: float = Field(-5.0, le=0, description="Log-probs after the wrong sibling count as at least this.")
    half_weight: float = Field(1.0, ge=0, description="t: divergence of the two teachers at which a token weighs 1/2.")
    distill: DistillConfig = Field(
        default_factory=lambda: DistillConfig(coefficient=1.0, kind="forward_kl", tail="bucket", top_k=100, clip=0.05),
        description="The divergence and its weight.",
    )

    @property
    def hint_shows(self) -> frozenset[str]:
        """What the hint template must show."""
        return frozenset({"attempt"})

    def errors(self, around: Surroundings) -> Iterator[str]:
        """A divergence that cannot be computed, or is not of the guided target."""
        yield from super().errors(around)
        if self.distill.support != "teacher":
            yield f"distill.support: the target is made on the teacher's top k, not on {self.distill.support}"
        if self.distill.tail != "bucket":
            yield f"distill.tail: the target is made with a bucket for the rest; set bucket, not {self.distill.tail}"


class ContrastiveOPSD(Distillation):
    """See ContrastiveOPSDConfig."""

    config: ContrastiveOPSDConfig

    def is_trained(self, group: Group, index: int) -> bool:
        """Only samples with a right and a wrong sibling."""
        return super().is_trained(group, index) and has_pair(group, index, self.config.siblings)

    def _of(self, place: Place, group: Group, sample: Sample) -> Iterator[Scoring]:
        """The teacher's top k after the right sibling, and its log-probs of the same tokens after the wrong one."""
        pair, ids, distill = self.config.siblings, sample.completion.token_ids, self.config.distill
        seed = sample, self.step, group.problem.id
        (right,) = draw(right_siblings(group, place[2], pair), 1, *seed, "right")
        (wrong,) = draw(wrong_siblings(group, place[2], pair), 1, *seed, "wrong")
        first, second = (self.prompts.hinted(group.problem, sibling_hint(s, pair)) for s in (right, wrong))
        key = (*place, "right")
        yield Scoring(key, first, ids, "teacher", top_k=distill.top_k, temperature=distill.temperature)
        yield Scoring((*place, "wrong"), second, ids, "teacher", temperature=distill.temperature, at=key)
        if self.updates_per_step > 1 and distill.importance_cap is not None:
            yield own_scoring(place, "old", group, sample, self.temperature)

    def examples(
        self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score], totals: Mapping[str, float] = NO_TOTALS
    ) -> list[Example]:
        """One example per rollout with both hints, its tokens weighted by how far the two teachers differ."""
        examples = []
        for place, group, sample in self.trained(groups):
            target, weights_T = self._guided(place, scores)
            examples.append(student_distillation(place, group, sample, target, scores, weights_T))
        return examples

    def totals(self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score]) -> dict[str, float]:
        """Sum and number of the tokens' weights: for the metrics alone."""
        weights = [self._guided(place, scores)[1] for place, *_ in self.trained(groups)]
        return {
            "contrast/weight": float(sum(weights_T.sum() for weights_T in weights)),
            "contrast/tokens": float(sum(map(len, weights))),
        }

    def totals_metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Mean weight of the tokens."""
        tokens = totals["contrast/tokens"]
        return {"contrast/mean_weight": totals["contrast/weight"] / tokens} if tokens else {}

    def _guided(self, place: Place, scores: Mapping[ScoringKey, Score]) -> tuple[TopLogprobs, np.ndarray]:
        """The guided target, and m [T]."""
        right, wrong = scores[(*place, "right")], scores[(*place, "wrong")]
        assert right.top is not None and wrong.at_logprobs_TK is not None
        right_TB, wrong_TB = with_rest(right.top.logprobs_TK), with_rest(wrong.at_logprobs_TK)
        divergence_T = np.maximum((np.exp(right_TB) * (right_TB - wrong_TB)).sum(-1), 0.0)
        a, half = self.config.guidance, self.config.half_weight
        weights_T = divergence_T / (divergence_T + half) if half else np.ones_like(divergence_T)
        guided_TB = (1 + a) * right_TB - a * np.maximum(wrong_TB, self.config.floor)
        guided_TB -= np.logaddexp.reduce(guided_TB, axis=-1, keepdims=True)
        return TopLogprobs(right.top.ids_TK, guided_TB[:, :-1].astype(np.float32)), weights_T


def with_rest(logprobs_TK: np.ndarray) -> np.ndarray:
    """Log-probs float64 [T, K + 1]: those given, and that of all other tokens together."""
    logprobs = logprobs_TK.astype(np.float64)
    rest = np.maximum(1.0 - np.exp(logprobs).sum(-1, keepdims=True), _SMALLEST_REST)
    return np.concatenate([logprobs, np.log(rest)], axis=-1)
