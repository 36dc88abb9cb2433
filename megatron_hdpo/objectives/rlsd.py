"""RLSD: the advantage of a token is moved by how much better a hinted teacher expected it. And RLSD with contrast.

arXiv 2604.03128. With the evidence D_t = ln p(y_t | x, answer) - ln q(y_t | x), detached, and w_t = exp(sign(A) D_t),

    A'_t = A ((1 - lambda) + lambda clip(w_t, 1 - e, 1 + e)),

then the clipped surrogate as ever. lambda falls linearly to 0, where the method is GRPO and asks for no scores. A right
rollout's expected tokens get more praise, a wrong one's less blame. The equation that the paper prints without lambda
bounds w on one side only; built is the one above. q is the policy before the step's update, as is the ratio's
denominator. Both log-probs are at the sampling temperature, that of all log-probs of sampled tokens.

evidence=contrast (arXiv 2606.11709): D_t = ln p(y_t | x, right sibling) - ln p(y_t | x, wrong sibling), one pair per
rollout under one template. A rollout without such a pair keeps its plain advantage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from megatron_hdpo.objectives.advantages import AdvantageKind
from megatron_hdpo.objectives.base import NO_TOTALS
from megatron_hdpo.objectives.grpo import GRPO, GRPOConfig, is_masked, student_example
from megatron_hdpo.objectives.settings import OWN_TEACHERS, TeacherKind
from megatron_hdpo.objectives.siblings import (
    PairConfig,
    PrivilegedPrompts,
    draw,
    has_pair,
    right_siblings,
    sibling_hint,
    wrong_siblings,
)
from megatron_hdpo.objectives.targets import Place, own_scoring
from megatron_hdpo.types.learning import Example, Score, Scoring, ScoringKey
from megatron_hdpo.types.rollouts import Group, Sample

_LARGEST_EVIDENCE = 60.0
"""exp of more overflows float32; the clip of w has long decided by then."""


class RLSDConfig(GRPOConfig):
    """GRPO whose advantages are modulated by a hinted teacher."""

    teachers: ClassVar[tuple[TeacherKind, ...]] = OWN_TEACHERS

    name: Literal["rlsd"] = "rlsd"  # type: ignore[assignment]
    advantage: AdvantageKind = Field("group", description="Baseline and scale of the advantages.")
    evidence: Literal["answer", "contrast"] = Field(
        "answer",
        description="answer: teacher with the ground truth against student; contrast: right against wrong "
        "sibling, both in the teacher's prompt.",
    )
    siblings: PairConfig = Field(default_factory=PairConfig, description="The siblings of evidence=contrast.")
    mix: float = Field(0.5, ge=0, le=1, description="Share of the modulated advantage at the first step (lambda).")
    mix_steps: int | None = Field(
        50, ge=1, description="Rollout steps over which that share falls linearly to 0; null keeps it."
    )
    modulation_clip: float = Field(0.2, gt=0, lt=1, description="The factor stays within 1 - this and 1 + this.")

    @property
    def needs_privileged(self) -> bool:
        """For the evidence of the answer."""
        return self.evidence == "answer"

    @property
    def hint_shows(self) -> frozenset[str]:
        """What the hint template must show."""
        return frozenset({"attempt"}) if self.evidence == "contrast" else frozenset()

    def mix_at(self, step: int) -> float:
        """lambda at a rollout step counted from 0."""
        return self.mix if self.mix_steps is None else self.mix * max(0.0, 1.0 - step / self.mix_steps)


class RLSD(GRPO):
    """See RLSDConfig. prompts: makes the teacher's contexts."""

    config: RLSDConfig

    def __init__(
        self, config: RLSDConfig, temperature: float, prompts: PrivilegedPrompts, updates_per_step: int = 1
    ) -> None:
        super().__init__(config, temperature, updates_per_step)
        self.prompts = prompts

    def scorings(self, groups: Sequence[Group]) -> list[Scoring]:
        """GRPO's, and what the evidence of rollouts with an advantage is made of, while there is any weight on it."""
        scorings = super().scorings(groups)
        if self.config.mix_at(self.step) == 0.0:
            return scorings
        for g, group in enumerate(groups):
            values = self._advantages(group)
            for s, sample in enumerate(group.samples):
                if values[s] and sample.length and not is_masked(sample, self.config):
                    scorings += self._evidence_scorings((g, "student", s), group, sample)
        return scorings

    def _evidence_scorings(self, place: Place, group: Group, sample: Sample) -> Iterator[Scoring]:
        ids = sample.completion.token_ids
        for name, context in self._contexts(place[2], group).items():
            yield Scoring((*place, name), context, ids, "teacher", temperature=self.temperature)
        if self.config.evidence == "answer" and self.updates_per_step == 1:  # else GRPO asks for it
            yield own_scoring(place, "old", group, sample, self.temperature)

    def _contexts(self, index: int, group: Group) -> dict[str, np.ndarray]:
        """Prompt ids of the teacher by the name of the score."""
        if self.config.evidence == "answer":
            return {"hinted": self.prompts.privileged(group.problem)}
        pair = self.config.siblings
        if not has_pair(group, index, pair):
            return {}
        target = group.samples[index]
        found = {"right": right_siblings(group, index, pair), "wrong": wrong_siblings(group, index, pair)}
        drawn = {name: draw(c, 1, target, self.step, group.problem.id, name)[0] for name, c in found.items()}
        return {name: self.prompts.hinted(group.problem, sibling_hint(s, pair)) for name, s in drawn.items()}

    def examples(
        self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score], totals: Mapping[str, float] = NO_TOTALS
    ) -> list[Example]:
        """One example per student rollout, with an advantage for each token."""
        examples = []
        for g, group in enumerate(groups):
            values = self._advantages(group)
            for s, sample in enumerate(group.samples):
                place = (g, "student", s)
                value_T = float(values[s]) * self._factor(place, float(values[s]), sample.length, scores)
                old, reference = (scores.get((*place, name)) for name in ("old", "reference"))
                old = old if self.updates_per_step > 1 else None
                examples.append(student_example(group, sample, value_T, self.config, old, reference))
        return examples

    def totals(self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score]) -> dict[str, float]:
        """Tokens with evidence, their clipped factors, and how many the clip holds: for the metrics alone."""
        sums = dict.fromkeys(("rlsd/tokens", "rlsd/factor", "rlsd/clipped"), 0.0)
        clip = self.config.modulation_clip
        for g, group in enumerate(groups):
            for s, value in enumerate(self._advantages(group)):
                weights_T = self._weights((g, "student", s), float(value), scores)
                if weights_T is not None:
                    sums["rlsd/tokens"] += len(weights_T)
                    sums["rlsd/factor"] += float(np.clip(weights_T, 1 - clip, 1 + clip).sum())
                    sums["rlsd/clipped"] += int((np.abs(weights_T - 1) > clip).sum())
        return sums

    def totals_metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Mean of the clipped factors, share of the tokens whose factor is clipped, and lambda."""
        tokens = totals["rlsd/tokens"]
        means = {f"rlsd/{name}": totals[f"rlsd/{name}"] / tokens for name in ("factor", "clipped")} if tokens else {}
        return means | {"rlsd/mix": self.config.mix_at(self.step)}

    def _factor(self, place: Place, value: float, length: int, scores: Mapping[ScoringKey, Score]) -> np.ndarray:
        """What multiplies the advantage, float64 [T]; 1 without evidence."""
        weights_T = self._weights(place, value, scores)
        if weights_T is None:
            return np.ones(length)
        mix, clip = self.config.mix_at(self.step), self.config.modulation_clip
        return (1 - mix) + mix * np.clip(weights_T, 1 - clip, 1 + clip)

    def _weights(self, place: Place, value: float, scores: Mapping[ScoringKey, Score]) -> np.ndarray | None:
        """exp(sign(A) D) of each token, None without evidence."""
        for_it, against = ("hinted", "old") if self.config.evidence == "answer" else ("right", "wrong")
        first, second = scores.get((*place, for_it)), scores.get((*place, against))
        if first is None or second is None:
            return None
        evidence_T = first.logprobs_T.astype(np.float64) - second.logprobs_T.astype(np.float64)
        return np.exp(np.clip(np.sign(value) * evidence_T, -_LARGEST_EVIDENCE, _LARGEST_EVIDENCE))
