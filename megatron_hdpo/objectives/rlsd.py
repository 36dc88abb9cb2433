"""RLSD: policy gradient whose advantages are scaled, token by token, by a teacher that reads a hint.

arXiv 2604.03128. With the evidence D_t = ln p(y_t | x, answer) - ln q(y_t | x), detached, and w_t = exp(sign(A) D_t),

    A'_t = A ((1 - lambda) + lambda clip(w_t, 1 - e, 1 + e)),

then the usual clipped surrogate. lambda falls linearly to 0, where the method is GRPO and asks for no scores. Tokens
that the teacher expects get a larger positive advantage in a right rollout, and a smaller negative one in a wrong
rollout. The equation that the paper prints without lambda bounds w on one side only; this file has the one above. q is
the policy before the step's update, as is the ratio's denominator. Both log-probs are at the sampling temperature, as
are all log-probs of sampled tokens.

evidence=contrast (arXiv 2606.11709): D_t = ln p(y_t | x, right sibling) - ln p(y_t | x, wrong sibling), one pair per
rollout with the same template. A rollout without such a pair keeps its plain advantage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from megatron_hdpo.objectives.advantages import AdvantageKind
from megatron_hdpo.objectives.base import NO_TOTALS
from megatron_hdpo.objectives.examples import SampleKey, own_scoring, student_samples
from megatron_hdpo.objectives.grpo import GRPO, GRPOConfig
from megatron_hdpo.objectives.settings import OWN_TEACHERS, SNAPSHOT, TeacherKind, TeacherSection
from megatron_hdpo.objectives.siblings import PairConfig, has_pair, pair_hints
from megatron_hdpo.types.headline import Headline
from megatron_hdpo.types.learning import Example, Score, Scoring, ScoringKey
from megatron_hdpo.types.rollouts import Group, Sample

_LARGEST_EVIDENCE = 60.0
"""Bound of the exponent: exp of more overflows float32, and w is clipped far below that."""

_MIX = Headline("rlsd/mix", "mix", "Weight of the evidence in the advantages (lambda)")


class RLSDConfig(GRPOConfig):
    """GRPO with advantages scaled by a teacher that reads a hint."""

    teachers: ClassVar[tuple[TeacherKind, ...]] = OWN_TEACHERS
    default_teacher: ClassVar[TeacherSection | None] = SNAPSHOT

    name: Literal["rlsd"] = "rlsd"  # type: ignore[assignment]
    advantage: AdvantageKind = Field("group", description="Baseline and scale of the advantages.")
    evidence: Literal["answer", "contrast"] = Field(
        "answer",
        description="answer: teacher with the ground truth against student; contrast: right against wrong "
        "sibling, both in the teacher's prompt.",
    )
    siblings: PairConfig = Field(default_factory=PairConfig, description="The siblings of evidence=contrast.")
    mix: float = Field(0.5, ge=0, le=1, description="Share of the scaled advantage at the first step (lambda).")
    mix_steps: int | None = Field(
        50, ge=1, description="Rollout steps over which that share falls linearly to 0; null keeps it."
    )
    modulation_clip: float = Field(0.2, gt=0, lt=1, description="The factor stays within 1 - this and 1 + this.")

    @property
    def needs_privileged(self) -> bool:
        """Return whether the evidence is the answer."""
        return self.evidence == "answer"

    @property
    def hint_shows(self) -> frozenset[str]:
        """Return the variables that the hint template must contain."""
        return frozenset({"attempt"}) if self.evidence == "contrast" else frozenset()

    def mix_at(self, step: int) -> float:
        """Return lambda at a rollout step, counted from 0."""
        return self.mix if self.mix_steps is None else self.mix * max(0.0, 1.0 - step / self.mix_steps)


class RLSD(GRPO):
    """GRPO with scaled advantages."""

    config: RLSDConfig

    def scorings(self, groups: Sequence[Group]) -> list[Scoring]:
        """Return GRPO's scorings, and those of the evidence for samples with an advantage while lambda > 0."""
        scorings = super().scorings(groups)
        if self.config.mix_at(self.step) == 0.0:
            return scorings
        values = [self._advantages(group) for group in groups]
        for key, group, sample in self.trained(groups):
            if values[key[0]][key[2]]:
                scorings += self._evidence_scorings(key, group, sample)
        return scorings

    def _evidence_scorings(self, key: SampleKey, group: Group, sample: Sample) -> Iterator[Scoring]:
        ids = sample.completion.token_ids
        for name, context in self._contexts(key[2], group).items():
            yield Scoring((*key, name), context, ids, "teacher", temperature=self.temperature)
        if self.config.evidence == "answer" and self.updates_per_step == 1:  # else GRPO asks for it
            yield own_scoring(key, "old", group, sample, self.temperature)

    def _contexts(self, index: int, group: Group) -> dict[str, np.ndarray]:
        """Return the teacher's prompt ids, int32 [P], by the name of the score."""
        if self.config.evidence == "answer":
            return {"hinted": self.prompts.privileged_prompt(group.problem)}
        pair = self.config.siblings
        hints = pair_hints(group, index, pair, self.step) if has_pair(group, index, pair) else []
        return {
            name: self.hinted(group.problem, hint) for name, hint in zip(("right", "wrong"), hints, strict=bool(hints))
        }

    def examples(
        self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score], totals: Mapping[str, float] = NO_TOTALS
    ) -> list[Example]:
        """Return one example per student sample, with an advantage for each token."""
        values = [self._advantages(group) for group in groups]
        examples = []
        for key, group, sample in student_samples(groups):
            value = float(values[key[0]][key[2]])
            value_T = value * self._factor(key, value, sample.length, scores)
            examples.append(self._example(key, group, sample, value_T, scores))
        return examples

    @property
    def headlines(self) -> Sequence[Headline]:
        """Return the headlines of GRPO, and the weight of the evidence."""
        first, *rest = super().headlines
        return (first, _MIX, *rest)

    def totals(self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score]) -> dict[str, float]:
        """Return the number of tokens with evidence, the sum of their clipped factors, and how many are clipped.

        For the metrics alone.
        """
        sums = dict.fromkeys(("rlsd/tokens", "rlsd/factor", "rlsd/clipped"), 0.0)
        clip, values = self.config.modulation_clip, [self._advantages(group) for group in groups]
        for key, _, _ in student_samples(groups):
            weights_T = self._weights(key, float(values[key[0]][key[2]]), scores)
            if weights_T is not None:
                sums["rlsd/tokens"] += len(weights_T)
                sums["rlsd/factor"] += float(np.clip(weights_T, 1 - clip, 1 + clip).sum())
                sums["rlsd/clipped"] += int((np.abs(weights_T - 1) > clip).sum())
        return sums

    def totals_metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Return the mean of the clipped factors, the share of tokens whose factor is clipped, and lambda."""
        tokens = totals["rlsd/tokens"]
        means = {f"rlsd/{name}": totals[f"rlsd/{name}"] / tokens for name in ("factor", "clipped")} if tokens else {}
        return means | {"rlsd/mix": self.config.mix_at(self.step)}

    def _factor(self, key: SampleKey, value: float, length: int, scores: Mapping[ScoringKey, Score]) -> np.ndarray:
        """Return the factor of the advantage, float64 [T]; 1 without evidence."""
        weights_T = self._weights(key, value, scores)
        if weights_T is None:
            return np.ones(length)
        mix, clip = self.config.mix_at(self.step), self.config.modulation_clip
        return (1 - mix) + mix * np.clip(weights_T, 1 - clip, 1 + clip)

    def _weights(self, key: SampleKey, value: float, scores: Mapping[ScoringKey, Score]) -> np.ndarray | None:
        """Return exp(sign(A) D) of each token, float64 [T]; None without evidence."""
        for_it, against = ("hinted", "old") if self.config.evidence == "answer" else ("right", "wrong")
        first, second = scores.get((*key, for_it)), scores.get((*key, against))
        if first is None or second is None:
            return None
        evidence_T = first.logprobs_T.astype(np.float64) - second.logprobs_T.astype(np.float64)
        return np.exp(np.clip(np.sign(value) * evidence_T, -_LARGEST_EVIDENCE, _LARGEST_EVIDENCE))
