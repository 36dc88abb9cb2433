"""PACED: prompts weighted by p^a (1 - p)^b of their pass rate p; first on the teacher's tokens, then on the student's.

arXiv 2603.11178, its self-distillation track: the teacher is the model that reads the reference solution. Before
`switch_step` the divergence is forward KL on privileged rollouts that are right, from it on reverse KL on the
student's own rollouts. Pass rates are those of the student's rollouts when a prompt is met first, and again in each new
period: at the switch, and every `reestimate_every` steps if that is set.

Weights are normalised to mean 1 over the tokens of the step, so that L = sum w D / sum w; prompts of weight 0 then
change nothing. `weights: raw` leaves them: L = sum w D / N, at most a quarter of the unweighted loss for a = b = 1. The
paper does not say which; the mean over tokens, not over prompts, is decided here, as it keeps L a mean of D. Prompts
with p = 0 or p = 1 have weight 0 whatever the exponents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from megatron_hdpo.data.leakage import LeakageConfig
from megatron_hdpo.objectives.base import NO_TOTALS
from megatron_hdpo.objectives.distillation import Distillation, DistillationConfig, student_distillation
from megatron_hdpo.objectives.grpo import group_shares
from megatron_hdpo.objectives.privileged import PrivilegedFilter, PrivilegedRolloutConfig, privileged_metrics
from megatron_hdpo.objectives.settings import Surroundings
from megatron_hdpo.objectives.siblings import PrivilegedPrompts
from megatron_hdpo.objectives.targets import Place, target_of, target_scorings
from megatron_hdpo.types.divergences import DivergenceKind
from megatron_hdpo.types.learning import DistillConfig, Example, LossSpec, Score, Scoring, ScoringKey
from megatron_hdpo.types.rollouts import Group, Sample


class PACEDConfig(DistillationConfig):
    """Distillation paced by pass rates, in two stages."""

    privileged_prompts: ClassVar[bool] = True

    name: Literal["paced"] = "paced"
    distill: DistillConfig = Field(
        default_factory=lambda: DistillConfig(coefficient=1.0, kind="forward_kl", tail="bucket", top_k=100),
        description="The divergence and its weight; its kind is that of the first stage.",
    )
    second_kind: DivergenceKind = Field("reverse_kl", description="Which divergence from switch_step on.")
    switch_step: int = Field(
        50, ge=0, description="Rollout step, from 0, at which the second stage begins; 0: no first stage."
    )
    privileged: PrivilegedRolloutConfig = Field(
        default_factory=PrivilegedRolloutConfig, description="The teacher's rollouts of the first stage."
    )
    pass_exponent: float = Field(1.0, ge=0, description="a: exponent of the pass rate p.")
    fail_exponent: float = Field(1.0, ge=0, description="b: exponent of 1 - p.")
    weights: Literal["mean_one", "raw"] = Field("mean_one", description="Normalised over the step's tokens, or not.")
    reestimate_every: int | None = Field(
        None, ge=1, description="Rollout steps after which pass rates are measured again; null: at the switch only."
    )

    def errors(self, around: Surroundings) -> Iterator[str]:
        """A divergence of either stage that cannot be computed; one rollout, whose pass rate is 0 or 1."""
        yield from super().errors(around)
        second = self.second.errors(around.vocab_size)
        yield from (line.replace("distill.kind", "second_kind") for line in second if "distill.top_k" not in line)
        if around.samples_per_prompt < 2:
            yield "name: paced weights prompts by pass rates, which need rollout.samples_per_prompt of 2 or more"

    @property
    def second(self) -> DistillConfig:
        """The divergence of the second stage."""
        return self.distill.model_copy(update={"kind": self.second_kind})


class PACED(Distillation):
    """See PACEDConfig. leakage, leak_markers: as for HDPO. Remembers pass rates by problem, with the step of each."""

    config: PACEDConfig

    def __init__(
        self,
        config: PACEDConfig,
        temperature: float,
        prompts: PrivilegedPrompts,
        updates_per_step: int = 1,
        leakage: LeakageConfig | None = None,
        leak_markers: Sequence[str] = (),
    ) -> None:
        super().__init__(config, temperature, prompts, updates_per_step)
        self.filter = PrivilegedFilter(config.privileged, leakage or LeakageConfig(), tuple(leak_markers))
        self.rates: dict[str, tuple[float, int]] = {}

    @property
    def loss(self) -> LossSpec:
        """The divergence of the present stage."""
        first = self.step < self.config.switch_step
        return replace(super().loss, distill=self.config.distill if first else self.config.second)

    def begin_step(self, step: int, groups: Sequence[Group]) -> None:
        """Remember the step, and the pass rates of prompts that it measures."""
        super().begin_step(step, groups)
        self.rates |= {g.problem.id: measured for g in groups if (measured := self._measured(g, step)) is not None}

    def weight(self, group: Group, step: int) -> float:
        """p^a (1 - p)^b of a prompt at a step, before normalisation; 0 for p in {0, 1} and where nothing was judged."""
        measured = self._measured(group, step)
        if measured is None or measured[0] in (0.0, 1.0):
            return 0.0
        return measured[0] ** self.config.pass_exponent * (1.0 - measured[0]) ** self.config.fail_exponent

    def privileged(self, group: Group, step: int) -> int:
        """In the first stage, the teacher's rollouts of a prompt that has any weight."""
        first = step < self.config.switch_step
        return self.config.privileged.rollouts if first and self.weight(group, step) > 0 else 0

    def keep_privileged(self, group: Group) -> Group:
        """The right, distinct, honest rollouts."""
        return self.filter.keep(group)

    def has_signal(self, group: Group) -> bool:
        """Whether the prompt has any weight."""
        return self.weight(group, self.step) > 0

    def scorings(self, groups: Sequence[Group]) -> list[Scoring]:
        """The teacher's distribution at each token of the stage's rollouts of prompts that have any weight."""
        scorings: list[Scoring] = []
        for place, group, sample in self.trained(groups):
            if self.weight(group, self.step) > 0:
                scorings += self._of(place, group, sample)
        return scorings

    def _of(self, place: Place, group: Group, sample: Sample) -> Iterator[Scoring]:
        if place[1] == "student":
            yield from super()._of(place, group, sample)
            return
        assert group.privileged_prompt_ids is not None
        context = group.privileged_prompt_ids
        yield from target_scorings(place, group.prompt_ids, context, sample, self.config.distill)

    def teacher_context(self, group: Group, index: int) -> np.ndarray:
        """The prompt with the ground truth."""
        return self.prompts.privileged(group.problem)

    def trained(self, groups: Sequence[Group]) -> Iterator[tuple[Place, Group, Sample]]:
        """The present stage's rollouts."""
        if self.step >= self.config.switch_step:
            yield from super().trained(groups)
            return
        for g, group in enumerate(groups):
            for s, sample in enumerate(group.privileged):
                if sample.length > 0:
                    yield (g, "privileged", s), group, sample

    def totals(self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score]) -> dict[str, float]:
        """Tokens of the stage's rollouts, and the sum of their weights."""
        rollouts = [(self.weight(group, self.step), sample.length) for _, group, sample in self.trained(groups)]
        return {
            "paced/weight": sum(weight * length for weight, length in rollouts),
            "paced/tokens": float(sum(length for _, length in rollouts)),
        }

    def examples(
        self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score], totals: Mapping[str, float] = NO_TOTALS
    ) -> list[Example]:
        """One example per rollout of the stage, weighted by its prompt; those of weight 0 only count."""
        examples = []
        for place, group, sample in self.trained(groups):
            weight = self.weight(group, self.step)
            if weight == 0:
                examples.append(_counted(group, sample))
                continue
            if self.config.weights == "mean_one":
                weight *= totals["paced/tokens"] / totals["paced/weight"]
            target, weights_T = target_of(place, scores, self.config.distill), np.full(sample.length, weight)
            examples.append(student_distillation(place, group, sample, target, scores, weights_T))
        return examples

    def totals_metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Mean weight of a token before normalisation, and the stage."""
        tokens = totals["paced/tokens"]
        mean = {"paced/mean_weight": totals["paced/weight"] / tokens} if tokens else {}
        return mean | {"paced/stage": 1.0 if self.step < self.config.switch_step else 2.0}

    def metrics(self, groups: Sequence[Group]) -> dict[str, float]:
        """Shares of kinds of groups, and what became of the teacher's rollouts."""
        return group_shares(groups, self.config.privileged.success_threshold) | privileged_metrics(groups)

    def state(self) -> dict[str, Any]:
        """Pass rates by problem, each with the step that measured it."""
        return {"rates": {problem: list(measured) for problem, measured in self.rates.items()}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take the pass rates back."""
        self.rates = {problem: (float(rate), int(step)) for problem, (rate, step) in state["rates"].items()}

    def _measured(self, group: Group, step: int) -> tuple[float, int] | None:
        """Pass rate of the prompt and the step that measured it: the one remembered if it is of the same period, else
        that of this group's rollouts; what is remembered where there are none."""
        known = self.rates.get(group.problem.id)
        if not group.samples or (known is not None and self._period(known[1]) == self._period(step)):
            return known
        return sum(map(self.filter.is_right, group.samples)) / len(group.samples), step

    def _period(self, step: int) -> tuple[bool, int]:
        every = self.config.reestimate_every
        return step >= self.config.switch_step, step // every if every else 0


def _counted(group: Group, sample: Sample) -> Example:
    """An example without a loss that counts its tokens."""
    zeros_T = np.zeros(sample.length, dtype=np.float32)
    ids = sample.completion.token_ids
    return Example(
        group.prompt_ids, ids, zeros_T, zeros_T, distill_weights_T=zeros_T, distill_count=float(sample.length)
    )
