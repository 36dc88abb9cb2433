"""A coordinator on ranks that are threads, with a fake engine and a fake judge."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from fake_engine import Fails, FakeEngine

from megatron_hdpo.rewards.judgement import Judgement
from megatron_hdpo.rollout.config import RolloutConfig
from megatron_hdpo.sampling.coordinator import RolloutCoordinator
from megatron_hdpo.sampling.sampler import RolloutSampler
from megatron_hdpo.types.problem import Problem

PROBLEMS = [Problem(id=f"task/{i}", task="task", question=f"q{i}", answer=str(i)) for i in range(5)]


class Prompts:
    def student(self, problem: Problem) -> np.ndarray:
        return np.array([1, int(problem.answer)], dtype=np.int32)

    def privileged_prompt(self, problem: Problem) -> np.ndarray:
        return np.array([2, int(problem.answer), 9], dtype=np.int32)


@dataclass
class World:
    """Ranks that are threads of one process; `gather_objects` waits for all of them, as the real one does."""

    size: int
    bound: int | None = None

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

    @property
    def bound(self) -> int | None:
        return self.world.bound

    def barrier(self, what: str) -> None:
        self.world.barrier.wait()

    def gather_objects(self, value: Any) -> list[Any]:
        self.world.box[self.rank] = value
        self.world.barrier.wait()
        gathered = list(self.world.box)
        self.world.barrier.wait()
        return gathered


def coordinator(
    context: Any, fails: Fails = lambda request, index: False, seed: int = 3, deterministic: bool = False
) -> RolloutCoordinator:
    """deterministic: an engine that repeats itself exactly is asked in two phases."""
    engine = FakeEngine(fails)
    engine.deterministic = deterministic
    sampler = RolloutSampler(engine, Judge(lambda text: text.startswith("4")), text_of)  # type: ignore[arg-type]
    config = RolloutConfig(samples_per_prompt=3, max_new_tokens=8, routing_replay=True)
    return RolloutCoordinator(config, context, sampler, Prompts(), stop_token_ids=(1,), seed=seed)  # type: ignore[arg-type]


class Judge:
    """Stands in for the pool: rewards by text, and a failed check where `fails` says so."""

    def __init__(self, fails: Callable[[str], bool] = lambda text: False) -> None:
        self.fails = fails

    def submit(self, problem: Problem, response: str, tokens: int = 0) -> Future[Judgement]:
        future: Future[Judgement] = Future()
        failed = self.fails(response)
        right = float(len(response) % 2)
        judged = Judgement(right, None, 0.0, None if right else f"not {response}")
        future.set_result(Judgement(None, "broken", 0.0) if failed else judged)
        return future


def text_of(ids: np.ndarray) -> str:
    return "-".join(map(str, ids))
