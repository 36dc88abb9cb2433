"""Rollouts of each step, sampled on request or while the step before is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from megatron_hdpo.sampling.coordinator import RolloutCoordinator, SampledShare
from megatron_hdpo.sampling.sampler import Progress
from megatron_hdpo.sampling.step_rollouts import StepRollouts
from megatron_hdpo.types.learning import Objective
from megatron_hdpo.types.problem import Problem


class PrefetchedRollouts:
    """Samples the rollouts of the next step in a thread.

    `begin` starts a step on each rank independently; `take` is collective and returns its groups.
    """

    def __init__(self, coordinator: RolloutCoordinator) -> None:
        self.coordinator = coordinator
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts-ahead")
        self._begun: tuple[int, Future[SampledShare]] | None = None

    def begin(self, problems: Sequence[Problem], step: int, objective: Objective) -> None:
        """Start to sample this rank's share of a step with the engine's current weights."""
        self._begun = step, self._thread.submit(self.coordinator.sample_step, problems, step, objective)

    def wait(self) -> None:
        """Wait until nothing is being sampled; an error is raised by `take` later."""
        if self._begun is not None:
            self._begun[1].exception()

    def take(
        self, problems: Sequence[Problem], step: int, objective: Objective, progress: Progress | None = None
    ) -> StepRollouts:
        """Return the groups of a step: those begun before, or sampled now. Collective."""
        if self._begun is None:
            return self.coordinator.step(problems, step, objective, progress)
        begun_step, future = self._begun
        assert begun_step == step, f"step {begun_step} was begun, step {step} is wanted"
        self._begun = None
        return self.coordinator.finish_step(future.result(), objective, progress)

    def close(self) -> None:
        """Shut down without waiting for the running job."""
        self._thread.shutdown(wait=False, cancel_futures=True)
