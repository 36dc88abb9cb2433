"""The coordinator: the same groups in the same order on any number of ranks."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from fake_engine import Fails, FakeEngine
from test_sampler import Judge, text_of

from megatron_hdpo.data.problem import Problem
from megatron_hdpo.objectives.interface import PrivilegedPlan
from megatron_hdpo.rollout.config import RolloutConfig
from megatron_hdpo.rollout.rollouts import RolloutCoordinator
from megatron_hdpo.rollout.sampler import Sampler
from megatron_hdpo.rollout.types import Group

PROBLEMS = [Problem(id=f"task/{i}", task="task", question=f"q{i}", answer=str(i)) for i in range(5)]


class Prompts:
    def student(self, problem: Problem) -> np.ndarray:
        return np.array([1, int(problem.answer)], dtype=np.int32)

    def privileged(self, problem: Problem) -> np.ndarray:
        return np.array([2, int(problem.answer), 9], dtype=np.int32)


@dataclass
class World:
    """Ranks that are threads of one process; `gather_objects` waits for all of them, as the real one does."""

    size: int

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=20)
        self.box: list[Any] = [None] * self.size

    def run(self, work: Any) -> list[Any]:
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(work, [Context(self, rank) for rank in range(self.size)]))


@dataclass
class Context:
    world: World
    rank: int

    @property
    def world_size(self) -> int:
        return self.world.size

    def gather_objects(self, value: Any) -> list[Any]:
        self.world.box[self.rank] = value
        self.world.barrier.wait()
        gathered = list(self.world.box)
        self.world.barrier.wait()
        return gathered


def coordinator(context: Any, fails: Fails = lambda request, index: False, seed: int = 3) -> RolloutCoordinator:
    sampler = Sampler(FakeEngine(fails), Judge(lambda text: text.startswith("4")), text_of)  # type: ignore[arg-type]
    config = RolloutConfig(samples_per_prompt=3, max_new_tokens=8)
    return RolloutCoordinator(config, context, sampler, Prompts(), (1,), seed)  # type: ignore[arg-type]


def contents(groups: Sequence[Group]) -> list[Any]:
    return [
        (g.problem.id, g.prompt_ids.tolist(), g.dropped, [(s.text, s.reward) for s in g.samples],
         None if g.privileged_prompt_ids is None else g.privileged_prompt_ids.tolist(),
         [(s.text, s.reward) for s in g.privileged])
        for g in groups
    ]  # fmt: skip


def whole_step(context: Any) -> list[Any]:
    def unlucky(request: Any, index: int) -> bool:
        return request.prompt_ids[1] == 2 and index == 0

    rollouts = coordinator(context, unlucky)
    groups = rollouts.student(PROBLEMS, step=4)
    rollouts.privileged(groups, [PrivilegedPlan(1, 2), PrivilegedPlan(2, 4)], 4, 0, lambda group: group)
    return contents(groups)


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_any_number_of_ranks_makes_the_same_step(ranks: int) -> None:
    alone = World(1).run(whole_step)[0]
    assert [group[0] for group in alone] == [problem.id for problem in PROBLEMS]
    assert alone[2][2]["generation_failed"] == 1 and alone[2][2]["privileged_generation_failed"] == 1
    assert len(alone[1][5]) + alone[1][2].get("privileged_check_failed", 0) == 2
    assert World(ranks).run(whole_step) == [alone] * ranks


def test_each_request_goes_to_one_rank() -> None:
    def asked(context: Any) -> list[str]:
        rollouts = coordinator(context)
        rollouts.student(PROBLEMS, 0)
        return [request.request_id for request in rollouts.sampler.engine.seen]  # type: ignore[attr-defined]

    asked_of = World(2).run(asked)
    assert [len(ids) for ids in asked_of] == [3, 2]
    assert len({id for ids in asked_of for id in ids}) == 5


def seeds(purpose: Any, seed: int = 3, problems: Sequence[Problem] = PROBLEMS) -> list[int]:
    rollouts = coordinator(World(1) and Context(World(1), 0), seed=seed)
    purpose(rollouts, problems)
    return [request.seed for request in rollouts.sampler.engine.seen]  # type: ignore[attr-defined]


def student(step: int) -> Any:
    return lambda rollouts, problems: rollouts.student(problems, step)


def privileged(rollouts: RolloutCoordinator, problems: Sequence[Problem]) -> None:
    groups = [Group(problem, np.array([1], dtype=np.int32), []) for problem in problems]
    rollouts.privileged(groups, [PrivilegedPlan(i, 1) for i in range(len(groups))], 0, 0, lambda group: group)


def test_seeds_depend_on_run_step_purpose_and_problem_only() -> None:
    assert seeds(student(0)) == seeds(student(0))
    assert seeds(student(0), problems=PROBLEMS[::-1]) == seeds(student(0))[::-1]
    every = [*seeds(student(0)), *seeds(student(1)), *seeds(student(0), seed=4), *seeds(privileged)]
    assert len(set(every)) == len(every) == 20


def test_privileged_rollouts_use_the_privileged_prompt_and_the_filter() -> None:
    rollouts = coordinator(Context(World(1), 0))
    groups = [Group(problem, np.array([1], dtype=np.int32), []) for problem in PROBLEMS]

    def keep(group: Group) -> Group:
        group.privileged = group.privileged[:1]
        return group

    rollouts.privileged(groups, [PrivilegedPlan(3, 4)], 0, top_logprobs=5, keep=keep)
    (request,) = rollouts.sampler.engine.seen  # type: ignore[attr-defined]
    assert request.prompt_ids.tolist() == [2, 3, 9]
    assert (request.sampling.n, request.sampling.top_logprobs, request.sampling.stop_token_ids) == (4, 5, (1,))
    assert [len(group.privileged) for group in groups] == [0, 0, 0, 1, 0]
    assert [group.privileged_prompt_ids is None for group in groups] == [True, True, True, False, True]
