"""Groups of a step on all ranks: student rollouts, and privileged ones where the objective asks for them.

The sampling ranks share the problems; then outlines of the groups are gathered, so that every rank knows the whole step
in the same order, for any number of ranks, while each group stays where it was sampled (`step_rollouts.py`). A group's
privileged rollouts are requested as soon as its last student rollout has been judged, while other groups are still
being sampled.

When an engine loses its weights (its last server died), only its rank stops sampling; then all ranks restore the
weights together, and the rank samples what is missing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from megatron_hdpo.data.prompts import PromptBuilder
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.parallel.stop_request import StopRequested
from megatron_hdpo.rollout.config import RolloutConfig
from megatron_hdpo.rollout.engine import EngineLostWeights
from megatron_hdpo.sampling.sampler import (
    Progress,
    RolloutRequest,
    RolloutSampler,
    SampledRollouts,
    SamplingJob,
    rollout_seed,
)
from megatron_hdpo.sampling.step_rollouts import StepRollouts, gather_outlines
from megatron_hdpo.types.learning import Objective
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.rollouts import Group, SamplingParams

LOGGER = logging.getLogger(__name__)


@dataclass
class SampledShare:
    """Rollouts that one rank has sampled for a step.

    problems: all problems of the step. groups: by the index of their problem. complete: whether the groups hold all
    privileged rollouts that the objective asks for. unfinished: what an engine without weights has left to do.
    """

    step: int
    problems: Sequence[Problem]
    groups: dict[int, Group] = field(default_factory=dict)
    complete: bool = True
    unfinished: SamplingJob | None = None

    @property
    def is_unfinished(self) -> bool:
        """Return whether something is left to do; a job of several shares may have been finished for another one."""
        return self.unfinished is not None and not self.unfinished.is_complete

    def run(self, sampling: SamplingJob) -> None:
        """Sample to the end, until the engine loses its weights, or until the run is asked to end."""
        self.unfinished = None if completed(sampling) else sampling


def completed(sampling: SamplingJob) -> bool:
    """Sample until the engine loses its weights, or the run is asked to end; return whether all was sampled before."""
    try:
        sampling.run()
    except EngineLostWeights as error:
        LOGGER.warning("sampling stopped, the engine has no weights: %s", error)
        return False
    except StopRequested:
        LOGGER.info("sampling stopped, the run is to end")
        return False
    return True


class RolloutCoordinator:
    """Samples the groups of a step on all ranks; see the module's docstring.

    stop_token_ids: tokens that end a response. seed: of the run. sampling_ranks: the ranks with an engine that takes
    requests, all by default. restore_weights: sends the run's weights to all engines again; collective. The
    construction is collective.
    """

    def __init__(
        self,
        config: RolloutConfig,
        context: ParallelContext,
        sampler: RolloutSampler,
        prompts: PromptBuilder,
        stop_token_ids: tuple[int, ...],
        seed: int,
        sampling_ranks: Sequence[int] | None = None,
        restore_weights: Callable[[], object] | None = None,
    ) -> None:
        self.config = config
        self.context = context
        self.sampler = sampler
        self.prompts = prompts
        self.stop_token_ids = stop_token_ids
        self.seed = seed
        self.restore_weights = restore_weights
        self.sampling_ranks = list(range(context.world_size) if sampling_ranks is None else sampling_ranks)
        # Of all ranks: one without a server cannot tell, and all must take the same collectives.
        self._deterministic = any(context.gather_objects(sampler.engine.deterministic))

    def step(
        self, problems: Sequence[Problem], step: int, objective: Objective, progress: Progress | None = None
    ) -> StepRollouts:
        """Return groups of `samples_per_prompt` rollouts of the problems, in their order. Collective.

        The groups hold the privileged rollouts that the objective asks for. Raises EngineLostWeights when the engine
        lost its weights and `restore_weights` is None, StopRequested on all ranks when any was asked to end the run.
        """
        return self.finish_step(self.sample_step(problems, step, objective, progress), objective, progress)

    def sample_step(
        self, problems: Sequence[Problem], step: int, objective: Objective, progress: Progress | None = None
    ) -> SampledShare:
        """Sample this rank's share of a step. Not collective: a thread may run it while the ranks train."""
        job = self.sampler.begin([], progress)
        share = self.add_share(job, problems, step, objective)
        share.run(job)
        return share

    def add_share(
        self,
        job: SamplingJob,
        problems: Sequence[Problem],
        step: int,
        objective: Objective,
        done: Callable[[SampledShare], None] = lambda share: None,
    ) -> SampledShare:
        """Let this rank's share of a step join a job; done(share) is called when its last request is complete."""
        share = SampledShare(step, problems, complete=not self._bounded(len(problems), objective))
        sampling = self.config.sampling(self.config.samples_per_prompt, self.stop_token_ids)
        requests = self._requests(problems, sampling, ("train", step))
        requests = [replace(request, stop_at=self.config.stop_at_reward) for request in requests]
        share.groups = {int(r.key): Group(r.problem, r.prompt_ids, []) for r in requests}
        left = len(requests)

        def then(request: RolloutRequest, rollouts: SampledRollouts) -> list[RolloutRequest]:
            nonlocal left
            following = self._judged(share, objective, request, rollouts)
            left += len(following) - 1
            if not left:
                done(share)
            return following

        job.add(requests, then)
        if not requests:
            done(share)
        return share

    def finish_step(self, share: SampledShare, objective: Objective, progress: Progress | None = None) -> StepRollouts:
        """Return all groups of the step, from the shares of all ranks. Collective."""
        self._finish(share)
        if not share.complete:
            chosen = self._chosen(share, objective)
            requests = [self._privileged(share, g, n, objective) for g, n in chosen.items() if g in share.groups]
            share.run(self.sampler.begin(requests, progress, partial(self._judged, share, objective)))
            self._finish(share)
        return gather_outlines(share.groups, self.context, share.problems)

    def _chosen(self, share: SampledShare, objective: Objective) -> dict[int, int]:
        """Return the numbers of privileged rollouts of the first groups that get any, by index, for all ranks.

        The bound counts the cliffs of the whole step, so the choice does not depend on the ranks. Collective.
        """
        own = {g: objective.privileged_rollouts_for(group, share.step) for g, group in share.groups.items()}
        planned = {g: n for part in self.context.gather_objects(own) for g, n in part.items() if n}
        return dict(sorted(planned.items())[: objective.max_privileged_prompts])

    def groups(
        self,
        problems: Sequence[Problem],
        sampling: SamplingParams,
        purpose: tuple[object, ...],
        progress: Progress | None = None,
    ) -> StepRollouts:
        """Return groups of the problems under any sampling parameters, without privileged rollouts. Collective.

        purpose: enters the seeds.
        """
        share = SampledShare(0, problems)
        requests = self._requests(problems, sampling, purpose)
        share.groups = {int(r.key): Group(r.problem, r.prompt_ids, []) for r in requests}

        def then(request: RolloutRequest, rollouts: SampledRollouts) -> list[RolloutRequest]:
            group = share.groups[int(request.key)]
            group.samples, group.dropped = rollouts.samples, rollouts.dropped
            return []

        share.run(self.sampler.begin(requests, progress, then))
        self._finish(share)
        return gather_outlines(share.groups, self.context, problems)

    def _requests(
        self, problems: Sequence[Problem], sampling: SamplingParams, purpose: tuple[object, ...]
    ) -> list[RolloutRequest]:
        """Return the requests this rank samples: rank i of n takes problems i, i+n, i+2n, ..."""
        ranks = self.sampling_ranks
        if self.context.rank not in ranks:
            return []
        return [
            RolloutRequest(
                str(i),
                problems[i],
                self.prompts.student(problems[i]),
                sampling,
                rollout_seed(self.seed, *purpose, problems[i].id),
            )
            for i in range(ranks.index(self.context.rank), len(problems), len(ranks))
        ]

    def _judged(
        self, share: SampledShare, objective: Objective, request: RolloutRequest, rollouts: SampledRollouts
    ) -> list[RolloutRequest]:
        """Store the rollouts of a complete request in their group; return the group's next request, if any."""
        index, _, privileged = request.key.partition("/")
        group = share.groups[int(index)]
        if privileged:
            group.privileged_samples = rollouts.samples
            for reason, count in rollouts.dropped.items():
                group.dropped[f"privileged_{reason}"] = count
            objective.keep_privileged(group)
            return []
        group.samples, group.dropped = rollouts.samples, rollouts.dropped
        count = objective.privileged_rollouts_for(group, share.step) if share.complete else 0
        return [self._privileged(share, int(index), count, objective)] if count else []

    def _privileged(self, share: SampledShare, index: int, count: int, objective: Objective) -> RolloutRequest:
        group = share.groups[index]
        group.privileged_prompt_ids = self.prompts.privileged_prompt(group.problem)
        sampling = self.config.sampling(count, self.stop_token_ids, objective.privileged_top_logprobs)
        # Privileged rollouts are trained under the student's prompt, so the engine's expert choices do not apply.
        sampling = replace(sampling, routed_experts=False)
        seed = rollout_seed(self.seed, "privileged", share.step, group.problem.id)
        return RolloutRequest(f"{index}/privileged", group.problem, group.privileged_prompt_ids, sampling, seed)

    def _bounded(self, problems: int, objective: Objective) -> bool:
        """Return whether privileged rollouts must wait until all student rollouts of the step are judged."""
        bound = objective.max_privileged_prompts
        if self._deterministic:
            # Otherwise the time at which a check ends would change the engine's batches, and so the last bits of
            # log-probs.
            return True
        return not self.config.overlap_privileged or (bound is not None and bound < problems)

    def _are_unfinished(self, share: SampledShare) -> bool:
        """Return whether a rank's engine has no weights, once every rank has stopped sampling."""
        self.context.barrier("rollouts of all ranks")
        ranks = self.context.gather_objects((bool(self.sampler.stop), share.is_unfinished))
        if any(stops for stops, _ in ranks):
            raise StopRequested(self.sampler.stop.reason)
        return any(unfinished for _, unfinished in ranks)

    def _finish(self, share: SampledShare) -> None:
        """Return once every rank has finished sampling. Collective."""
        while self._are_unfinished(share):
            if self.restore_weights is None:
                raise EngineLostWeights("the engine has lost the weights, and there is no way to restore them")
            self.restore_weights()
            if share.unfinished is not None and share.is_unfinished:
                share.run(share.unfinished)
