"""HDPO: GRPO, and on prompts that every rollout failed, distillation from the model that has seen the answer.

arXiv 2603.23871, Algorithm 1 and Eq. 5: L = L_GRPO + lambda * (1/N_tok) sum JSD_k(teacher(. | x + y*, ȳ_<t), q(. | x,
ȳ_<t)) over the tokens of privileged rollouts ȳ that are right. The gradient flows through q only. N_tok counts the
tokens of those rollouts, so the weight of the term does not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from megatron_hdpo.data.leakage import LeakageConfig
from megatron_hdpo.objectives.base import NO_TOTALS
from megatron_hdpo.objectives.grpo import GRPO, GRPOConfig, group_shares
from megatron_hdpo.objectives.privileged import PrivilegedFilter, PrivilegedRolloutConfig, privileged_metrics
from megatron_hdpo.objectives.settings import OWN_TEACHERS, Surroundings, TeacherKind
from megatron_hdpo.objectives.targets import target_of, target_scorings
from megatron_hdpo.types.learning import (
    DistillConfig,
    Example,
    HiddenStates,
    LossSpec,
    Score,
    Scoring,
    ScoringKey,
)
from megatron_hdpo.types.rollouts import Group, Sample, TopLogprobs


class PrivilegedConfig(PrivilegedRolloutConfig):
    """The second try at cliff prompts, and which of its rollouts become distillation data."""

    max_prompts_per_step: int = Field(32, ge=0, description="Cliff prompts per step that get a second try, at most.")


class HDPOConfig(GRPOConfig):
    """Hybrid distillation policy optimisation: GRPO plus privileged self-distillation on cliff prompts."""

    teachers: ClassVar[tuple[TeacherKind, ...]] = OWN_TEACHERS
    privileged_prompts: ClassVar[bool] = True

    name: Literal["hdpo"] = "hdpo"  # type: ignore[assignment]
    privileged: PrivilegedConfig = Field(default_factory=PrivilegedConfig, description="Privileged rollouts.")
    distill: DistillConfig = Field(default_factory=DistillConfig, description="The divergence and its weight.")
    logits_from: Literal["trainer", "rollout"] = Field(
        "trainer",
        description="Where the teacher's top k comes from: a forward pass of the trainer, or the engine that sampled "
        "the privileged rollout (no extra forward; drifting teacher only).",
    )

    def errors(self, around: Surroundings) -> Iterator[str]:
        """A divergence that cannot be computed; an engine's log-probs that are not the teacher's."""
        distill = self.distill
        yield from distill.errors(around.vocab_size)
        if self.logits_from != "rollout":
            return
        if distill.support != "teacher":
            yield f"logits_from: rollout gives the teacher's top k, but distill.support is {distill.support}"
        if around.teacher != "policy":
            yield f"logits_from: rollout gives the policy's logits, but teacher.kind is {around.teacher}"
        if around.temperature != distill.temperature:
            yield (
                f"logits_from: the engine's log-probs are at rollout.temperature {around.temperature}, "
                f"objective.distill.temperature is {distill.temperature}: make them equal or set logits_from=trainer"
            )


class HDPO(GRPO):
    """See HDPOConfig. leakage: which privileged responses give their help away; leak_markers: strings of the privileged
    prompt that no honest response contains."""

    config: HDPOConfig

    def __init__(
        self,
        config: HDPOConfig,
        temperature: float,
        updates_per_step: int = 1,
        leakage: LeakageConfig | None = None,
        leak_markers: Sequence[str] = (),
    ) -> None:
        super().__init__(config, temperature, updates_per_step)
        self.filter = PrivilegedFilter(config.privileged, leakage or LeakageConfig(), tuple(leak_markers))
        self.max_privileged_prompts = config.privileged.max_prompts_per_step
        self.privileged_top_logprobs = config.distill.top_k if config.logits_from == "rollout" else 0

    @property
    def loss(self) -> LossSpec:
        """The surrogate, its penalty and the divergence."""
        return replace(super().loss, distill=self.config.distill)

    def is_cliff(self, group: Group) -> bool:
        """Every judged rollout failed. A group without a judged rollout is no cliff: nothing is known of it."""
        return bool(group.samples) and all(not self.filter.is_right(sample) for sample in group.samples)

    def privileged(self, group: Group, step: int) -> int:
        """Privileged rollouts for a cliff."""
        taught = self.config.distill.coefficient > 0 and self.is_cliff(group)
        return self.config.privileged.rollouts if taught else 0

    def has_signal(self, group: Group) -> bool:
        """Whether any rollout has an advantage, or there is a privileged one to learn from."""
        return super().has_signal(group) or bool(group.privileged)

    def keep_privileged(self, group: Group) -> Group:
        """The right, distinct, honest rollouts, first come first kept."""
        return self.filter.keep(group)

    def scorings(self, groups: Sequence[Group]) -> list[Scoring]:
        """The teacher's distribution at each token of each kept rollout, after the privileged prompt."""
        scorings = super().scorings(groups)
        if self.config.logits_from == "rollout":
            return scorings
        for g, group in enumerate(groups):
            for s, sample in enumerate(group.privileged):
                assert group.privileged_prompt_ids is not None
                scorings += target_scorings(
                    (g, "privileged", s),
                    group.prompt_ids,
                    group.privileged_prompt_ids,
                    sample,
                    self.config.distill,
                )
        return scorings

    def examples(
        self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score], totals: Mapping[str, float] = NO_TOTALS
    ) -> list[Example]:
        """GRPO's examples, and one distillation example per kept privileged rollout, after the student's prompt."""
        examples = super().examples(groups, scores, totals)
        for g, group in enumerate(groups):
            for s, sample in enumerate(group.privileged):
                target = target_of((g, "privileged", s), scores, self.config.distill)
                target = target or sample.completion.top_logprobs
                if target is None:
                    raise ValueError(
                        f"problem {group.problem.id}: the engine returned no top log-probs with a privileged rollout; "
                        "set objective.logits_from=trainer"
                    )
                examples.append(distillation_example(group, sample, target))
        return examples

    def metrics(self, groups: Sequence[Group]) -> dict[str, float]:
        """Shares of kinds of groups; cliffs, and how many of them a privileged rollout taught something about."""
        cliffs = [group for group in groups if self.is_cliff(group)]
        metrics = group_shares(groups, self.config.privileged.success_threshold)
        metrics["privileged/cliff_prompts"] = float(len(cliffs))
        if cliffs:
            metrics["privileged/taught_prompts_rate"] = sum(bool(g.privileged) for g in cliffs) / len(cliffs)
        return metrics | privileged_metrics(groups)


def distillation_example(group: Group, sample: Sample, target: TopLogprobs | HiddenStates) -> Example:
    """A rollout seen by the student: its own prompt, the same response tokens, the teacher's distribution."""
    length = sample.length
    rows = len(target.hidden_TH if isinstance(target, HiddenStates) else target.ids_TK)
    if rows != length:
        raise ValueError(f"problem {group.problem.id}: target has {rows} rows for a response of {length} tokens")
    return Example(
        prompt_ids=group.prompt_ids,
        response_ids=sample.completion.token_ids,
        advantages_T=np.zeros(length, dtype=np.float32),
        surrogate_weights_T=np.zeros(length, dtype=np.float32),
        distill_weights_T=np.ones(length, dtype=np.float32),
        distill_count=float(length),
        target=target,
    )
