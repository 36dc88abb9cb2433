"""The groups of a step, on all ranks: student rollouts, and privileged ones where the objective asks for them.

Every rank has an engine and samples its share of the problems; groups are then gathered, so that every rank holds the
whole step in the same order, whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_hdpo.data.problem import Problem
from megatron_hdpo.data.prompts import PromptBuilder
from megatron_hdpo.objectives.interface import PrivilegedPlan
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.rollout.config import RolloutConfig
from megatron_hdpo.rollout.sampler import OnProgress, RolloutRequest, Rollouts, Sampler, rollout_seed
from megatron_hdpo.rollout.types import Group, SamplingParams


class RolloutCoordinator:
    """See the module. stop_token_ids: tokens that end a response. seed: the run's."""

    def __init__(
        self,
        config: RolloutConfig,
        context: ParallelContext,
        sampler: Sampler,
        prompts: PromptBuilder,
        stop_token_ids: tuple[int, ...],
        seed: int,
    ) -> None:
        self.config = config
        self.context = context
        self.sampler = sampler
        self.prompts = prompts
        self.stop_token_ids = stop_token_ids
        self.seed = seed

    def student(self, problems: Sequence[Problem], step: int, on_progress: OnProgress | None = None) -> list[Group]:
        """Groups of `samples_per_prompt` rollouts of the problems, in their order, on every rank."""
        sampling = self.config.sampling(self.config.samples_per_prompt, self.stop_token_ids)
        return self.groups(problems, sampling, ("train", step), on_progress)

    def groups(
        self,
        problems: Sequence[Problem],
        sampling: SamplingParams,
        purpose: tuple[object, ...],
        on_progress: OnProgress | None = None,
    ) -> list[Group]:
        """Groups of the problems under any sampling; `purpose` enters the seeds."""
        prompt_ids = [self.prompts.student(problem) for problem in problems]
        requests = [
            RolloutRequest(str(i), problem, prompt_ids[i], sampling, rollout_seed(self.seed, *purpose, problem.id))
            for i, problem in enumerate(problems)
        ]
        rollouts = self._sample_shared(requests, on_progress)
        return [
            Group(problem, prompt_ids[i], rollouts[str(i)].samples, dropped=rollouts[str(i)].dropped)
            for i, problem in enumerate(problems)
        ]

    def privileged(
        self,
        groups: Sequence[Group],
        plans: Sequence[PrivilegedPlan],
        step: int,
        top_logprobs: int,
        keep: Callable[[Group], Group],
        on_progress: OnProgress | None = None,
    ) -> None:
        """Give the planned groups their privileged rollouts, filtered by `keep`."""
        requests = []
        for plan in plans:
            group = groups[plan.group]
            group.privileged_prompt_ids = self.prompts.privileged(group.problem)
            sampling = self.config.sampling(plan.rollouts, self.stop_token_ids, top_logprobs)
            seed = rollout_seed(self.seed, "privileged", step, group.problem.id)
            requests.append(RolloutRequest(str(plan.group), group.problem, group.privileged_prompt_ids, sampling, seed))
        rollouts = self._sample_shared(requests, on_progress)
        for plan in plans:
            group = groups[plan.group]
            group.privileged = rollouts[str(plan.group)].samples
            for reason, count in rollouts[str(plan.group)].dropped.items():
                group.dropped[f"privileged_{reason}"] = count
            keep(group)

    def _sample_shared(self, requests: Sequence[RolloutRequest], on_progress: OnProgress | None) -> dict[str, Rollouts]:
        """Each rank samples every world-size-th request; the results of all, on every rank."""
        context = self.context
        mine = requests[context.rank :: context.world_size]
        merged: dict[str, Rollouts] = {}
        for part in context.gather_objects(self.sampler.sample(mine, on_progress)):
            merged |= part
        return merged
