"""RLCSD: tokens that a right sibling makes likely and wrong ones do not are moved, others keep the plain advantage.

arXiv 2606.11709, Eqs 8 to 10 and its code. For each rollout one right sibling h+ and up to K wrong ones h-_k, shown to
the teacher by one template in the same words, both called a reference:

    e_t = ln p(y_t | x, h+) - ln( (1/K) sum_k p(y_t | x, h-_k) ),   r_t = s tanh(e_t / tau),   m_t = [|r_t| > delta],
    A'_t = A + r_t, held at 0 where it would change the sign of A,
    J = mean over rollouts of ( mean of surr(A) over m = 0  +  eta * mean of surr(A') over m = 1 ),

an empty path left out. A path of one token so weighs as much as the other; `aggregation: pooled` takes both means over
the tokens of the whole step instead. (The published code takes them over each micro-batch, so that the result depends
on packing; that is not offered.) Rollouts without a right and a wrong sibling (groups without both outcomes, a lone
success, a lone failure) are left out and do not count. An advantage of 0 stays 0. Log-probs are at the sampling
temperature.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from megatron_hdpo.objectives.advantages import AdvantageKind
from megatron_hdpo.objectives.base import NO_TOTALS
from megatron_hdpo.objectives.grpo import GRPO, GRPOConfig, is_masked, student_example
from megatron_hdpo.objectives.settings import OWN_TEACHERS, Surroundings, TeacherKind
from megatron_hdpo.objectives.siblings import (
    PairConfig,
    PrivilegedPrompts,
    draw,
    has_pair,
    right_siblings,
    sibling_hint,
    wrong_siblings,
)
from megatron_hdpo.objectives.targets import Place
from megatron_hdpo.types.learning import Example, Score, Scoring, ScoringKey, SurrogateConfig
from megatron_hdpo.types.rollouts import Group, Sample


class RLCSDConfig(GRPOConfig):
    """GRPO with contrastive self-distillation."""

    teachers: ClassVar[tuple[TeacherKind, ...]] = OWN_TEACHERS

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
    evidence_scale: float = Field(0.02, gt=0, description="tau: evidence of this size moves by tanh(1).")
    bonus: float = Field(0.5, ge=0, description="s: largest move of an advantage.")
    threshold: float = Field(0.02, ge=0, description="delta: tokens that would move by no more keep the advantage.")
    moved_weight: float = Field(1.0, ge=0, description="eta: weight of the path of the moved tokens.")

    @property
    def hint_shows(self) -> frozenset[str]:
        """What the hint template must show."""
        return frozenset({"attempt"})

    def errors(self, around: Surroundings) -> Iterator[str]:
        """A threshold that no move exceeds."""
        yield from super().errors(around)
        if self.threshold >= self.bonus > 0:
            yield f"threshold: no token moves by more than bonus={self.bonus}, so {self.threshold} excludes all"
        if around.samples_per_prompt < 3:
            yield f"name: rlcsd needs rollout.samples_per_prompt of 3 or more, not {around.samples_per_prompt}"


class RLCSD(GRPO):
    """See RLCSDConfig. prompts: makes the teacher's contexts."""

    config: RLCSDConfig

    def __init__(
        self, config: RLCSDConfig, temperature: float, prompts: PrivilegedPrompts, updates_per_step: int = 1
    ) -> None:
        super().__init__(config, temperature, updates_per_step)
        self.prompts = prompts

    def is_trained(self, group: Group, index: int) -> bool:
        """Whether the sample has both hints and is not masked."""
        sample = group.samples[index]
        masked = sample.length == 0 or is_masked(sample, self.config)
        return not masked and has_pair(group, index, self.config.siblings)

    def has_signal(self, group: Group) -> bool:
        """Whether any rollout with hints has an advantage."""
        return any(value and self.is_trained(group, s) for s, value in enumerate(self._advantages(group)))

    def scorings(self, groups: Sequence[Group]) -> list[Scoring]:
        """GRPO's of the rollouts with hints, and the teacher's log-probs of each under every hint."""
        scorings: list[Scoring] = []
        for place, group, sample in self._trained(groups):
            scorings += self._sample_scorings(place, group, sample)
            for name, context in self._contexts(place[2], group).items():
                ids = sample.completion.token_ids
                scorings.append(Scoring((*place, name), context, ids, "teacher", temperature=self.temperature))
        return scorings

    def _contexts(self, index: int, group: Group) -> dict[str, np.ndarray]:
        """Prompt ids of the teacher: `right`, `wrong0`, `wrong1`, ..."""
        pair = self.config.siblings
        seed = group.samples[index], self.step, group.problem.id
        right = draw(right_siblings(group, index, pair), 1, *seed, "right")
        wrong = draw(wrong_siblings(group, index, pair), self.config.negatives, *seed, "wrong")
        drawn = {"right": right[0]} | {f"wrong{k}": sample for k, sample in enumerate(wrong)}
        return {name: self.prompts.hinted(group.problem, sibling_hint(s, pair)) for name, s in drawn.items()}

    def totals(self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score]) -> dict[str, float]:
        """Rollouts with hints, their tokens on each path, and tokens whose move the sign of the advantage holds."""
        sums = dict.fromkeys(("rlcsd/rollouts", "rlcsd/plain", "rlcsd/moved", "rlcsd/held"), 0.0)
        for place, group, _ in self._trained(groups):
            value = float(self._advantages(group)[place[2]])
            move_T = self._move(place, value, scores)
            moved_T = np.abs(move_T) > self.config.threshold
            sums["rlcsd/rollouts"] += 1
            sums["rlcsd/moved"] += int(moved_T.sum())
            sums["rlcsd/plain"] += int((~moved_T).sum())
            sums["rlcsd/held"] += int((moved_T & (value * (value + move_T) < 0)).sum())
        return sums

    def totals_metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Shares of the tokens that move, and of those that the sign of the advantage holds at 0."""
        moved = totals["rlcsd/moved"]
        tokens = moved + totals["rlcsd/plain"]
        shares = {"rlcsd/moved_share": moved / tokens} if tokens else {}
        return shares | ({"rlcsd/held_share": totals["rlcsd/held"] / moved} if moved else {})

    def examples(
        self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score], totals: Mapping[str, float] = NO_TOTALS
    ) -> list[Example]:
        """One example per rollout with hints, weighted by path."""
        return [self._example(place, group, sample, scores, totals) for place, group, sample in self._trained(groups)]

    def _example(
        self,
        place: Place,
        group: Group,
        sample: Sample,
        scores: Mapping[ScoringKey, Score],
        totals: Mapping[str, float],
    ) -> Example:
        value = float(self._advantages(group)[place[2]])
        move_T = self._move(place, value, scores)
        moved_T = np.abs(move_T) > self.config.threshold
        bound = (0.0, np.inf) if value > 0 else (-np.inf, 0.0)
        value_T = np.where(moved_T, np.clip(value + move_T, *bound), value)
        old, reference = (scores.get((*place, name)) for name in ("old", "reference"))
        example = student_example(group, sample, value_T, self.config, old, reference)
        weights_T = self._path_weights(moved_T, totals)
        return replace(example, surrogate_weights_T=weights_T.astype(np.float32), surrogate_count=1.0)

    def _path_weights(self, moved_T: np.ndarray, totals: Mapping[str, float]) -> np.ndarray:
        """1/n of the token's path, n counted in the rollout or in the step; then as many rollouts as the step has make
        up for the division by their number."""
        plain, moved, scale = float((~moved_T).sum()), float(moved_T.sum()), 1.0
        if self.config.aggregation == "pooled":
            plain, moved, scale = (totals[f"rlcsd/{name}"] for name in ("plain", "moved", "rollouts"))
        return scale * np.where(moved_T, self.config.moved_weight / max(moved, 1.0), 1.0 / max(plain, 1.0))

    def _move(self, place: Place, value: float, scores: Mapping[ScoringKey, Score]) -> np.ndarray:
        """r of each token, float64 [T]; 0 where the advantage is."""
        right = scores[(*place, "right")].logprobs_T.astype(np.float64)
        names = (f"wrong{k}" for k in range(self.config.negatives))
        wrong = [scores[(*place, name)].logprobs_T.astype(np.float64) for name in names if (*place, name) in scores]
        evidence_T = right - (np.logaddexp.reduce(wrong, axis=0) - np.log(len(wrong)))
        return self.config.bonus * np.tanh(evidence_T / self.config.evidence_scale) * (value != 0.0)

    def metrics(self, groups: Sequence[Group]) -> dict[str, float]:
        """GRPO's, and the share of rollouts that are left out."""
        samples = sum(len(group.samples) for group in groups)
        trained = sum(1 for _ in self._trained(groups))
        return super().metrics(groups) | ({"rlcsd/left_out_share": 1 - trained / samples} if samples else {})

    def _trained(self, groups: Sequence[Group]) -> Iterator[tuple[Place, Group, Sample]]:
        for g, group in enumerate(groups):
            for s, sample in enumerate(group.samples):
                if self.is_trained(group, s):
                    yield (g, "student", s), group, sample
