"""Base class of the objectives, what they are built from, and the metrics that they share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from megatron_hdpo.data.leakage import LeakageConfig
from megatron_hdpo.data.prompts import Hint, HintedPrompt
from megatron_hdpo.objectives.examples import SampleKey, student_samples
from megatron_hdpo.objectives.settings import ObjectiveSettings
from megatron_hdpo.types.headline import COVERED_MASS, DIVERGENCE, ENTROPY, GRADIENT_NORM, NLL, Headline
from megatron_hdpo.types.learning import LossSpec, Score, Scoring, ScoringKey
from megatron_hdpo.types.metrics import Metric
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.rollouts import Group, JudgedGroup, Sample

NO_TOTALS: Mapping[str, float] = MappingProxyType({})


class PrivilegedPrompts(Protocol):
    """Maker of the prompts that a teacher reads: `data.prompts.PromptBuilder`, or a stand-in. Ids are int32 [P]."""

    @property
    def markers(self) -> Sequence[str]:
        """Return the strings of privileged prompts that no honest response contains."""

    def privileged_prompt(self, problem: Problem) -> np.ndarray:
        """Return the prompt that shows the ground truth."""

    def hinted_prompt(self, problem: Problem, hint: Hint) -> HintedPrompt:
        """Return the prompt that shows a hint, and how much of it was cut."""


class NoPrompts:
    """Prompts of an objective whose teacher reads none; asking for one raises ValueError."""

    markers: tuple[str, ...] = ()

    def privileged_prompt(self, problem: Problem) -> np.ndarray:
        """Raise ValueError."""
        raise ValueError(f"problem {problem.id}: this objective needs prompts; pass ObjectiveDeps(prompts=...)")

    def hinted_prompt(self, problem: Problem, hint: Hint) -> HintedPrompt:
        """Raise ValueError."""
        return HintedPrompt(self.privileged_prompt(problem))


@dataclass
class HintCounts:
    """Hints of a step that this replica's teacher reads. lost_tokens: those that were cut off."""

    shown: int = 0
    cut: int = 0
    lost_tokens: int = 0

    def add(self, prompt: HintedPrompt) -> None:
        """Count a prompt."""
        self.shown += 1
        self.cut += prompt.lost > 0
        self.lost_tokens += prompt.lost

    def totals(self) -> dict[str, float]:
        """Return the counts by names that add up over replicas; {} if no hint was shown."""
        return {f"hint/{name}": float(count) for name, count in vars(self).items()} if self.shown else {}


def hint_metrics(totals: Mapping[str, float]) -> dict[str, float]:
    """Return the share of hints that were cut to fit, and the tokens that they lost; totals: over all replicas."""
    if not (shown := totals.get("hint/shown")):
        return {}
    return {
        "hint/cut_share": totals["hint/cut"] / shown,
        "hint/lost_tokens": Metric(totals["hint/lost_tokens"], "sum"),
    }


@dataclass(frozen=True)
class ObjectiveDeps:
    """Dependencies of an objective in addition to its settings.

    temperature: sampling temperature of the rollouts. updates_per_step: optimizer updates on the rollouts of one step.
    prompts: makes the teacher's prompts. leakage: which privileged responses give the help away.
    """

    temperature: float = 1.0
    updates_per_step: int = 1
    prompts: PrivilegedPrompts = field(default_factory=NoPrompts)
    leakage: LeakageConfig = field(default_factory=LeakageConfig)


class BaseObjective:
    """Defaults of an objective: no privileged samples, no scorings, no totals, no saved state.

    `step` is the current rollout step, counted from 0. A method defines `loss` and `examples`
    (`types.learning.Objective` lists the methods), and reads `config`, `temperature`, `updates_per_step` and `prompts`.
    """

    max_privileged_prompts: int | None = None
    privileged_top_logprobs: int = 0
    step: int = 0

    def __init__(self, config: ObjectiveSettings, deps: ObjectiveDeps) -> None:
        self.config = config
        self.temperature = deps.temperature
        self.updates_per_step = deps.updates_per_step
        self.prompts = deps.prompts
        self.hint_counts = HintCounts()

    @property
    def loss(self) -> LossSpec:
        """Return the loss of the current step. A method defines it."""
        raise NotImplementedError

    @property
    def headlines(self) -> Sequence[Headline]:
        """Return the metrics for the console. Default: divergence and covered mass, or likelihood and entropy."""
        own = (NLL, ENTROPY) if self.loss.distill is None else (DIVERGENCE, COVERED_MASS)
        return (*own, GRADIENT_NORM)

    def is_cliff(self, group: JudgedGroup) -> bool:
        """Return whether the group is a cliff, by the settings' threshold."""
        return is_cliff(group, self.config.cliff_threshold)

    def shares(self, groups: Sequence[JudgedGroup], success: float = 1.0) -> dict[str, float]:
        """Return `group_shares` with the settings' cliffs."""
        return group_shares(groups, success, self.config.cliff_threshold)

    def privileged_rollouts_for(self, group: Group, step: int) -> int:
        """Return the number of privileged samples that the group gets. Default: 0."""
        return 0

    def begin_step(self, step: int, groups: Sequence[JudgedGroup]) -> None:
        """Store the step."""
        self.step = step
        self.hint_counts = HintCounts()

    def hinted(self, problem: Problem, hint: Hint) -> np.ndarray:
        """Return the ids, int32 [P], of the prompt that shows a hint; `scorings` calls it once per hint.

        What does not fit is cut off the hint, and counted in `hint_counts`.
        """
        prompt = self.prompts.hinted_prompt(problem, hint)
        self.hint_counts.add(prompt)
        return prompt.ids

    def keep_privileged(self, group: Group) -> Group:
        """Return the group with the privileged samples that are used. Default: all."""
        return group

    def is_trained(self, group: Group, index: int) -> bool:
        """Return whether the method trains on a student sample. Default: if it has any token."""
        return group.samples[index].length > 0

    def trained(self, groups: Sequence[Group]) -> Iterator[tuple[SampleKey, Group, Sample]]:
        """Yield the samples that the method trains on, with key and group. Default: the student's, by `is_trained`."""
        for key, group, sample in student_samples(groups):
            if self.is_trained(group, key[2]):
                yield key, group, sample

    def has_signal(self, group: Group) -> bool:
        """Return whether the group can change the policy. Default: if it has a judged sample."""
        return bool(group.samples)

    def scorings(self, groups: Sequence[Group]) -> list[Scoring]:
        """Return the forward passes needed before the update. Default: none."""
        return []

    def totals(self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score]) -> dict[str, float]:
        """Return this replica's part of the sums over the step. Default: none."""
        return {}

    def totals_metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Return metrics made of the totals over all replicas. Default: none."""
        return {}

    def counts(self, groups: Sequence[Group]) -> dict[str, float]:
        """Return what `metrics` needs of texts and tokens, as sums over these groups. Default: none."""
        return {}

    def metrics(self, groups: Sequence[JudgedGroup], counts: Mapping[str, float] = NO_TOTALS) -> dict[str, float]:
        """Return metrics over all groups of the step. Default: none."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save in a checkpoint, as JSON values. Default: none."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. Default: do nothing."""


def is_cliff(group: JudgedGroup, threshold: float = 0.0) -> bool:
    """Return whether no sample's correctness exceeds the threshold; a group without a judged sample is no cliff.

    With threshold 0 and rewards that are not negative this is HDPO's definition, sum of rewards = 0 (arXiv 2603.23871,
    Algorithm 1). Correctness is what the checker says: it knows neither penalties nor other reward functions.
    """
    return bool(group.samples) and all(sample.correctness <= threshold for sample in group.samples)


def group_shares(groups: Sequence[JudgedGroup], success: float = 1.0, cliff_threshold: float = 0.0) -> dict[str, float]:
    """Return the shares of solved, mixed and cliff groups among those with a judged sample; {} if there is none.

    Cliff: as in `is_cliff`; solved: the correctness of every sample is at least `success`; mixed: the others. A group
    that is both is a cliff.
    """
    judged = [group for group in groups if group.samples]
    if not judged:
        return {}
    cliff = [is_cliff(group, cliff_threshold) for group in judged]
    solved = [all(s.correctness >= success for s in group.samples) for group in judged]
    cliffs, wins = sum(cliff), sum(won and not lost for won, lost in zip(solved, cliff, strict=True))
    counts = {"solved": wins, "cliff": cliffs, "mixed": len(judged) - cliffs - wins}
    return {f"rollout/{name}_rate": count / len(judged) for name, count in counts.items()}
