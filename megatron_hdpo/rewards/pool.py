"""Rewards from worker processes that can be killed: a hanging expression costs a worker, not the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from megatron_hdpo.rewards import worker
from megatron_hdpo.rewards.config import RewardConfig
from megatron_hdpo.rewards.functions import HttpService, OverlongPenalty, RewardFunction, WorkerFunction
from megatron_hdpo.rewards.gold import GoldVerdict
from megatron_hdpo.rewards.judgement import Judgement, all_of, combined
from megatron_hdpo.rewards.killable import KillableWorkers
from megatron_hdpo.rewards.services import Services
from megatron_hdpo.types.errors import UserError
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.shipped import dumps
from megatron_hdpo.types.task import Task

S = TypeVar("S")
T = TypeVar("T")

READY_SECONDS = 120.0


class RewardPoolError(UserError, RuntimeError):
    """The pool cannot work: its workers do not start, or it was closed."""


class RewardPool:
    """Killable worker processes that score responses: one at a time by `submit` from any thread, or many by `judge`.

    A recipe's reward functions that are services are asked beside them.
    """

    def __init__(self, tasks: Iterable[Task], config: RewardConfig | None = None) -> None:
        """Store the tasks; workers start at the first use. Raises ValueError when two tasks share a name."""
        self.config = config or RewardConfig()
        tasks = list(tasks)
        names = [task.task_name for task in tasks]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"tasks share a name: {', '.join(sorted(twice))}; give each its own `name`")
        self._functions = self.config.functions
        in_workers = [function for function in self._functions or () if isinstance(function, WorkerFunction)]
        self._workers = KillableWorkers(
            self.config.worker_count, worker.start, (dumps((tasks, in_workers)), self.config.memory_limit_mib)
        )
        self._services = Services([f for f in self._functions or () if isinstance(f, HttpService)])

    def start(self) -> None:
        """Start the workers and wait until one answers. Raises RewardPoolError with the reason when none does."""
        outcome = self._workers.call(worker.ready, (), READY_SECONDS).result()
        if outcome.error is not None:
            raise RewardPoolError(f"reward workers do not start: {outcome.error}")

    def check(self) -> None:
        """Raise RewardPoolError when a reward function of the recipe cannot work: it cannot be loaded, or is not there.

        Without such functions nothing is asked.
        """
        if any(isinstance(function, WorkerFunction) for function in self._functions or ()):
            self.start()
        if problems := self._services.problems():
            raise RewardPoolError("\n".join(f"reward.functions: {problem}" for problem in problems))

    def submit(self, problem: Problem, response: str, tokens: int | None = None) -> Future[Judgement]:
        """Check one response. tokens: its number of tokens, the stop token included; a penalty of lengths needs it.

        The future never fails: a check that fails gives a Judgement with an error.
        """
        if self._functions is None:
            return self._scored(worker.judge, problem, response)
        futures = [self._value(function, problem, response, tokens) for function in self._functions]
        return _mapped(all_of(futures), partial(combined, self._functions))

    def _value(
        self, function: RewardFunction, problem: Problem, response: str, tokens: int | None
    ) -> Future[Judgement]:
        """Return the judgement of a response by one of the reward functions."""
        if isinstance(function, HttpService):
            return self._services.submit(function, problem, response)
        if isinstance(function, WorkerFunction):
            return self._scored(worker.evaluate, function.function_name, problem, response)
        if isinstance(function, OverlongPenalty):
            value: Future[Judgement] = Future()
            error = "the number of tokens is not known" if tokens is None else None
            value.set_result(Judgement(None if tokens is None else function.value(tokens), error, 0.0))
            return value
        return self._scored(worker.judge, problem, response)

    def _scored(self, function: Callable[..., worker.Outcome], *args: object) -> Future[Judgement]:
        begin = time.monotonic()

        def judgement(outcome: worker.Outcome) -> Judgement:
            if outcome.error is not None:
                return Judgement(None, outcome.error, time.monotonic() - begin)
            reward, seconds, feedback = outcome.value
            return Judgement(reward, None, seconds, feedback)

        return _mapped(self._call(function, args), judgement)

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
        """Stop all workers, and ask services no more; checks in progress come back as failed. Idempotent."""
        self._services.close()
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
