"""RLCSD: policy gradient whose advantages move, token by token, by the contrast of right and wrong siblings.

arXiv 2606.11709, Eqs 8 to 10 and its code. For each rollout one right sibling h+ and up to K wrong ones h-_k, shown to
the teacher by the same template, all called a reference:

    e_t = ln p(y_t | x, h+) - ln( (1/K) sum_k p(y_t | x, h-_k) ),   r_t = s tanh(e_t / tau),   m_t = [|r_t| > delta],
    A'_t = A + r_t, held at 0 where it would change the sign of A,
    J = mean over rollouts of ( mean of surr(A) over m = 0  +  eta * mean of surr(A') over m = 1 ),

an empty path left out. So a path of one token has the same weight as the other path; `aggregation: pooled` takes both
means over the tokens of the whole step instead. (The published code takes them over each micro-batch, so that the
result depends on packing; that is not offered.) Rollouts without a right and a wrong sibling (groups without both
outcomes, a lone success, a lone failure) are left out and do not count. An advantage of 0 stays 0. Log-probs are at the
sampling temperature.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from megatron_hdpo.objectives.advantages import AdvantageKind
from megatron_hdpo.objectives.base import NO_TOTALS
from megatron_hdpo.objectives.examples import SampleKey
from megatron_hdpo.objectives.grpo import GRPO, GRPOConfig
from megatron_hdpo.objectives.settings import OWN_TEACHERS, SNAPSHOT, RecipeContext, TeacherKind, TeacherSection
from megatron_hdpo.objectives.siblings import PairConfig, has_pair, pair_hints
from megatron_hdpo.types.headline import Headline
from megatron_hdpo.types.learning import Example, Score, Scoring, ScoringKey, SurrogateConfig
from megatron_hdpo.types.rollouts import Group, JudgedGroup, Sample

_MOVED = Headline("rlcsd/moved_share", "moved", "Share of tokens whose advantage the evidence moves")


class RLCSDConfig(GRPOConfig):
    """GRPO with contrastive self-distillation."""

    teachers: ClassVar[tuple[TeacherKind, ...]] = OWN_TEACHERS
    default_teacher: ClassVar[TeacherSection | None] = SNAPSHOT

    name: Literal["rlcsd"] = "rlcsd"  # type: ignore[assignment]
    advantage: AdvantageKind = Field("group", description="Baseline and scale of the advantages.")
    aggregation: Literal["rollout", "pooled"] = Field(  # type: ignore[assignment]
        "rollout", description="Means of the two paths over each rollout's tokens, or over those of the whole step."
    )
    surrogate: SurrogateConfig = Field(
        default_factory=lambda: SurrogateConfig(dual_clip=3.0), description="The clipped surrogate."
    )
    siblings: PairConfig = Field(default_factory=PairConfig, description="Which siblings serve as hints.")
    negatives: int = Field(4, ge=1, description="Wrong siblings per rollout, at most (K).")
    evidence_scale: float = Field(0.02, gt=0, description="tau: evidence of this size moves by bonus * tanh(1).")
    bonus: float = Field(0.5, ge=0, description="s: largest move of an advantage.")
    threshold: float = Field(0.02, ge=0, description="delta: tokens that would move by no more keep their advantage.")
    moved_weight: float = Field(1.0, ge=0, description="eta: weight of the path of the moved tokens.")

    @property
    def hint_shows(self) -> frozenset[str]:
        """Return the variables that the hint template must contain."""
        return frozenset({"attempt"})

    def errors(self, context: RecipeContext) -> Iterator[str]:
        """Yield why no token would move, or why there are too few samples per prompt."""
        yield from super().errors(context)
        if self.threshold >= self.bonus > 0:
            yield f"threshold: no token moves by more than bonus={self.bonus}, so {self.threshold} excludes all"
        if context.samples_per_prompt < 3:
            yield f"name: rlcsd needs rollout.samples_per_prompt of 3 or more, not {context.samples_per_prompt}"


class RLCSD(GRPO):
    """GRPO with moved advantages; samples without a right and a wrong sibling are left out."""

    config: RLCSDConfig

    def is_trained(self, group: Group, index: int) -> bool:
        """Return whether the sample has both hints, has tokens and is not masked."""
        return super().is_trained(group, index) and has_pair(group, index, self.config.siblings)

    def has_signal(self, group: Group) -> bool:
        """Return whether any sample with hints has an advantage."""
        return any(value and self.is_trained(group, s) for s, value in enumerate(self._advantages(group)))

    def scorings(self, groups: Sequence[Group]) -> list[Scoring]:
        """Return GRPO's scorings of the samples with hints, and the teacher's of each after every hint."""
        scorings: list[Scoring] = []
        for key, group, sample in self.trained(groups):
            scorings += self._sample_scorings(key, group, sample)
            hints = pair_hints(group, key[2], self.config.siblings, self.step, self.config.negatives)
            for k, hint in enumerate(hints):
                name, context = f"wrong{k - 1}" if k else "right", self.hinted(group.problem, hint)
                ids = sample.completion.token_ids
                scorings.append(Scoring((*key, name), context, ids, "teacher", temperature=self.temperature))
        return scorings

    def totals(self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score]) -> dict[str, float]:
        """Return the number of samples with hints, of their tokens on each path, and of moves that stop at 0.

        A move stops at 0 where it would change the sign of the advantage.
        """
        sums = dict.fromkeys(("rlcsd/rollouts", "rlcsd/plain", "rlcsd/moved", "rlcsd/held"), 0.0)
        for key, group, _ in self.trained(groups):
            value = float(self._advantages(group)[key[2]])
            move_T = self._move(key, value, scores)
            moved_T = np.abs(move_T) > self.config.threshold
            sums["rlcsd/rollouts"] += 1
            sums["rlcsd/moved"] += int(moved_T.sum())
            sums["rlcsd/plain"] += int((~moved_T).sum())
            sums["rlcsd/held"] += int((moved_T & (value * (value + move_T) < 0)).sum())
        return sums

    def totals_metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Return the share of the tokens that move, and of those the share that stops at 0."""
        moved = totals["rlcsd/moved"]
        tokens = moved + totals["rlcsd/plain"]
        shares = {"rlcsd/moved_share": moved / tokens} if tokens else {}
        return shares | ({"rlcsd/held_share": totals["rlcsd/held"] / moved} if moved else {})

    def examples(
        self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score], totals: Mapping[str, float] = NO_TOTALS
    ) -> list[Example]:
        """Return one example per sample with hints, its tokens weighted by path."""
        return [self._by_path(key, group, sample, scores, totals) for key, group, sample in self.trained(groups)]

    def _by_path(
        self,
        key: SampleKey,
        group: Group,
        sample: Sample,
        scores: Mapping[ScoringKey, Score],
        totals: Mapping[str, float],
    ) -> Example:
        value = float(self._advantages(group)[key[2]])
        move_T = self._move(key, value, scores)
        moved_T = np.abs(move_T) > self.config.threshold
        bound = (0.0, np.inf) if value > 0 else (-np.inf, 0.0)
        value_T = np.where(moved_T, np.clip(value + move_T, *bound), value)
        weights_T = self._path_weights(moved_T, totals)
        example = self._example(key, group, sample, value_T, scores)
        return replace(example, surrogate_weights_T=weights_T.astype(np.float32), surrogate_count=1.0)

    def _path_weights(self, moved_T: np.ndarray, totals: Mapping[str, float]) -> np.ndarray:
        """Return 1/n of each token's path, float64 [T], with n counted in the sample or in the step.

        In the step, the factor `rollouts` cancels the division by the normaliser, which counts the samples.
        """
        plain, moved, scale = float((~moved_T).sum()), float(moved_T.sum()), 1.0
        if self.config.aggregation == "pooled":
            plain, moved, scale = (totals[f"rlcsd/{name}"] for name in ("plain", "moved", "rollouts"))
        return scale * np.where(moved_T, self.config.moved_weight / max(moved, 1.0), 1.0 / max(plain, 1.0))

    def _move(self, key: SampleKey, value: float, scores: Mapping[ScoringKey, Score]) -> np.ndarray:
        """Return r of each token, float64 [T]; 0 where the advantage is 0."""
        right = scores[(*key, "right")].logprobs_T.astype(np.float64)
        names = (f"wrong{k}" for k in range(self.config.negatives))
        wrong = [scores[(*key, name)].logprobs_T.astype(np.float64) for name in names if (*key, name) in scores]
        evidence_T = right - (np.logaddexp.reduce(wrong, axis=0) - np.log(len(wrong)))
        return self.config.bonus * np.tanh(evidence_T / self.config.evidence_scale) * (value != 0.0)

    @property
    def headlines(self) -> Sequence[Headline]:
        """Return the headlines of GRPO, and the share of tokens that the evidence moves."""
        first, *rest = super().headlines
        return (first, _MOVED, *rest)

    def counts(self, groups: Sequence[Group]) -> dict[str, float]:
        """Return the number of samples with hints."""
        return {"trained": float(sum(1 for _ in self.trained(groups)))}

    def metrics(self, groups: Sequence[JudgedGroup], counts: Mapping[str, float] = NO_TOTALS) -> dict[str, float]:
        """Return GRPO's metrics, and the share of samples that are left out."""
        samples = sum(len(group.samples) for group in groups)
        left_out = {"rlcsd/left_out_share": 1 - counts["trained"] / samples} if samples else {}
        return super().metrics(groups) | left_out
