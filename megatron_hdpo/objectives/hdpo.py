"""HDPO: GRPO, and on prompts that every rollout failed distillation from the model that reads the answer.

arXiv 2603.23871, Algorithm 1 and Eq. 5: L = L_GRPO + lambda * (1/N_tok) sum JSD_k(teacher(. | x + y*, ȳ_<t), q(. | x,
ȳ_<t)) over the tokens of privileged rollouts ȳ that are right. The gradient flows through q only. N_tok counts the
tokens of those rollouts, so the weight of the term does not depend on how many there are.

A prompt is a cliff where the sum of its rewards is 0 (`cliff_threshold`); a privileged rollout is right from
`privileged.success_threshold` on, as in the paper. A cliff has no advantages, so no prompt has both losses, unless
`reward.functions` has more than what decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from megatron_hdpo.objectives.base import NO_TOTALS, ObjectiveDeps
from megatron_hdpo.objectives.examples import distillation_example, privileged_samples, target_of, target_scorings
from megatron_hdpo.objectives.grpo import GRPO, GRPOConfig
from megatron_hdpo.objectives.privileged import PrivilegedFilter, PrivilegedRolloutConfig, privileged_metrics
from megatron_hdpo.objectives.settings import OWN_TEACHERS, POLICY, RecipeContext, TeacherKind, TeacherSection
from megatron_hdpo.types.headline import CLIFF_RATE, DISTILLED_TOKENS, DIVERGENCE, PRIVILEGED_SUCCESS, Headline
from megatron_hdpo.types.learning import DivergenceConfig, Example, LossSpec, Score, Scoring, ScoringKey
from megatron_hdpo.types.rollouts import Group, JudgedGroup


class PrivilegedConfig(PrivilegedRolloutConfig):
    """Privileged rollouts of cliff prompts, and which of them become distillation data."""

    max_prompts_per_step: int = Field(
        32, ge=0, description="Cliff prompts per step that get privileged rollouts, at most."
    )


class HDPOConfig(GRPOConfig):
    """Hybrid distillation policy optimisation: GRPO plus privileged self-distillation on cliff prompts."""

    teachers: ClassVar[tuple[TeacherKind, ...]] = OWN_TEACHERS
    default_teacher: ClassVar[TeacherSection | None] = POLICY
    privileged_prompts: ClassVar[bool] = True

    name: Literal["hdpo"] = "hdpo"  # type: ignore[assignment]
    privileged: PrivilegedConfig = Field(default_factory=PrivilegedConfig, description="Privileged rollouts.")
    distill: DivergenceConfig = Field(default_factory=DivergenceConfig, description="The divergence and its weight.")
    logits_from: Literal["trainer", "rollout"] = Field(
        "trainer",
        description="Where the teacher's top k comes from: a forward pass of the trainer, or the engine that sampled "
        "the privileged rollout (no extra forward; drifting teacher only).",
    )

    def errors(self, context: RecipeContext) -> Iterator[str]:
        """Yield why the divergence cannot be computed, or why the engine's log-probs are not the teacher's.

        Also why a cliff could hold a right rollout.
        """
        distill = self.distill
        yield from distill.errors(context.vocab_size)
        if self.cliff_threshold >= self.privileged.success_threshold:
            yield (
                f"cliff_threshold: {self.cliff_threshold:g} is no less than privileged.success_threshold="
                f"{self.privileged.success_threshold:g}: prompts with right rollouts would be cliffs"
            )
        if self.logits_from != "rollout":
            return
        if distill.support != "teacher":
            yield f"logits_from: rollout gives the teacher's top k, but distill.support is {distill.support}"
        if context.teacher != "policy":
            yield f"logits_from: rollout gives the policy's logits, but teacher.kind is {context.teacher}"
        if context.temperature != distill.temperature:
            yield (
                f"logits_from: the engine's log-probs are at rollout.temperature {context.temperature}, "
                f"objective.distill.temperature is {distill.temperature}: make them equal or set logits_from=trainer"
            )


class HDPO(GRPO):
    """GRPO, and on cliffs distillation of the right privileged samples."""

    config: HDPOConfig

    def __init__(self, config: HDPOConfig, deps: ObjectiveDeps) -> None:
        super().__init__(config, deps)
        self.filter = PrivilegedFilter(config.privileged, deps.leakage, tuple(deps.prompts.markers))
        self.max_privileged_prompts = config.privileged.max_prompts_per_step
        self.privileged_top_logprobs = config.distill.top_k if config.logits_from == "rollout" else 0

    @property
    def loss(self) -> LossSpec:
        """Return the surrogate, its penalty and the divergence."""
        return replace(super().loss, distill=self.config.distill)

    def privileged_rollouts_for(self, group: Group, step: int) -> int:
        """Return the number of privileged samples: those of the config for a cliff, else 0."""
        taught = self.config.distill.coefficient > 0 and self.is_cliff(group)
        return self.config.privileged.rollouts if taught else 0

    def has_signal(self, group: Group) -> bool:
        """Return whether any sample has an advantage, or there is a privileged sample to learn from."""
        return super().has_signal(group) or bool(group.privileged_samples)

    def keep_privileged(self, group: Group) -> Group:
        """Return the group with its right, distinct, honest privileged samples, in order of arrival."""
        return self.filter.keep(group)

    def scorings(self, groups: Sequence[Group]) -> list[Scoring]:
        """Return GRPO's scorings, and the teacher's of each kept sample after the privileged prompt."""
        scorings = super().scorings(groups)
        if self.config.logits_from == "rollout":
            return scorings
        for key, group, sample in privileged_samples(groups):
            assert group.privileged_prompt_ids is not None
            context = group.privileged_prompt_ids
            scorings += target_scorings(key, group.prompt_ids, context, sample, self.config.distill)
        return scorings

    def examples(
        self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score], totals: Mapping[str, float] = NO_TOTALS
    ) -> list[Example]:
        """Return GRPO's examples, and one distillation example per kept privileged sample, after the student's prompt.

        Raises ValueError if a privileged sample has neither a score nor top log-probs of the engine.
        """
        examples = super().examples(groups, scores, totals)
        for key, group, sample in privileged_samples(groups):
            target = target_of(key, scores, self.config.distill) or sample.completion.top_logprobs
            if target is None:
                raise ValueError(
                    f"problem {group.problem.id}: the engine returned no top log-probs with a privileged rollout; "
                    "set objective.logits_from=trainer"
                )
            examples.append(distillation_example(group, sample, target))
        return examples

    @property
    def headlines(self) -> Sequence[Headline]:
        """Return the share of cliffs, what becomes of them, and the headlines of GRPO."""
        cliffs = (CLIFF_RATE, PRIVILEGED_SUCCESS, DIVERGENCE, DISTILLED_TOKENS)
        return (*cliffs, *(headline for headline in super().headlines if headline not in cliffs))

    def metrics(self, groups: Sequence[JudgedGroup], counts: Mapping[str, float] = NO_TOTALS) -> dict[str, float]:
        """Return the shares of solved, mixed and cliff groups, and of cliffs with a kept privileged sample."""
        cliffs = [group for group in groups if self.is_cliff(group)]
        metrics = self.shares(groups, self.config.privileged.success_threshold)
        metrics["privileged/cliff_prompts"] = float(len(cliffs))
        if cliffs:
            metrics["privileged/taught_prompts_rate"] = sum(bool(g.privileged_samples) for g in cliffs) / len(cliffs)
        return metrics | privileged_metrics(groups)
