"""Rewards from worker processes that can be killed: a hanging expression costs a worker, not the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from megatron_hdpo.rewards import worker
from megatron_hdpo.rewards.config import RewardConfig
from megatron_hdpo.rewards.gold import GoldVerdict
from megatron_hdpo.rewards.killable import KillableWorkers
from megatron_hdpo.types.errors import UserError
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.shipped import dumps
from megatron_hdpo.types.task import Task

S = TypeVar("S")
T = TypeVar("T")

READY_SECONDS = 120.0


class RewardPoolError(UserError, RuntimeError):
    """The pool cannot work: its workers do not start, or it was closed."""


@dataclass(frozen=True)
class Judgement:
    """The result of a check: a reward, or None and the error that prevented it.

    seconds: time in the worker; for a failed check, time since it was submitted. feedback: the task's text about the
    response, None without any.
    """

    reward: float | None
    error: str | None
    seconds: float
    feedback: str | None = None


class RewardPool:
    """Killable worker processes that score responses: one at a time by `submit` from any thread, or many by `judge`."""

    def __init__(self, tasks: Iterable[Task], config: RewardConfig | None = None) -> None:
        """Store the tasks; workers start at the first use. Raises ValueError when two tasks share a name."""
        self.config = config or RewardConfig()
        tasks = list(tasks)
        names = [task.task_name for task in tasks]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"tasks share a name: {', '.join(sorted(twice))}; give each its own `name`")
        self._workers = KillableWorkers(
            self.config.worker_count, worker.start, (dumps(tasks), self.config.memory_limit_mib)
        )

    def start(self) -> None:
        """Start the workers and wait until one answers. Raises RewardPoolError with the reason when none does."""
        outcome = self._workers.call(worker.ready, (), READY_SECONDS).result()
        if outcome.error is not None:
            raise RewardPoolError(f"reward workers do not start: {outcome.error}")

    def submit(self, problem: Problem, response: str) -> Future[Judgement]:
        """Check one response. The future never fails: a check that fails gives a Judgement with an error."""
        begin = time.monotonic()

        def judgement(outcome: worker.Outcome) -> Judgement:
            if outcome.error is not None:
                return Judgement(None, outcome.error, time.monotonic() - begin)
            reward, seconds, feedback = outcome.value
            return Judgement(reward, None, seconds, feedback)

        return _mapped(self._call(worker.judge, (problem, response)), judgement)

    def judge(self, pairs: Sequence[tuple[Problem, str]]) -> list[Judgement]:
        """Check many responses; the results are in the order of `pairs`."""
        return [future.result() for future in [self.submit(problem, response) for problem, response in pairs]]

    def check_golds(self, answers: Sequence[str]) -> list[GoldVerdict]:
        """Return for each of these gold answers whether math-verify can parse it."""
        outcomes = [future.result() for future in [self._call(worker.check_gold, (answer,)) for answer in answers]]
        return [
            GoldVerdict(outcome.value) if outcome.error is None else GoldVerdict(outcome.error, certain=False)
            for outcome in outcomes
        ]

    def close(self) -> None:
        """Stop all workers; checks in progress come back as failed. Idempotent."""
        self._workers.close()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, function: Callable[..., worker.Outcome], args: tuple[object, ...]) -> Future[worker.Outcome]:
        limit_s = self.config.time_limit_s
        on_the_clock_s = max(limit_s, self.config.hang_limit_s)
        return self._workers.call(function, (*args, limit_s), on_the_clock_s, self.config.max_retries)


def _mapped(source: Future[S], function: Callable[[S], T]) -> Future[T]:
    """Return a future of `function` applied to the result of a future that never fails."""
    target: Future[T] = Future()
    source.add_done_callback(lambda done: target.set_result(function(done.result())))
    return target
