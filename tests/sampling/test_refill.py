"""Dynamic sampling: groups without signal make room for further problems, and only those."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pytest

from megatron_hdpo.data.order import ProblemOrder
from megatron_hdpo.objectives.base import ObjectiveDeps
from megatron_hdpo.objectives.grpo import GRPO, GRPOConfig
from megatron_hdpo.sampling.refill import refilled, with_signal
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.rollouts import Completion, Group, Sample

GRPO_OBJECTIVE = GRPO(GRPOConfig(), ObjectiveDeps())


def group(name: str, *rewards: float) -> Group:
    ids = np.array([3, 4], dtype=np.int32)
    completion = Completion(ids, np.zeros(2, np.float32), "stop", np.zeros(2, np.int32))
    return Group(Problem(name, "t", "q", "a"), ids, [Sample(completion, "", reward) for reward in rewards])


MIXED, CLIFF, SOLVED, EMPTY = group("mixed", 1, 0), group("cliff", 0, 0), group("solved", 1, 1), group("empty")


def test_each_round_replaces_what_is_still_without_signal() -> None:
    asked: list[tuple[int, int, set[str]]] = []
    answers = [[group("a", 0, 0), group("b", 1, 0), group("c", 1, 1)], [group("d", 0, 1), group("e", 0, 0)]]

    def more(turn: int, count: int, leave_out: Collection[str]) -> list[Group]:
        asked.append((turn, count, set(leave_out)))
        return answers[turn]

    groups = refilled([MIXED, CLIFF, SOLVED, EMPTY], 2, 4, GRPO_OBJECTIVE, more)
    assert asked == [
        (0, 3, {"mixed", "cliff", "solved", "empty"}),
        (1, 2, {"mixed", "cliff", "solved", "empty", "a", "b", "c"}),
    ]
    assert [g.problem.id for g in groups] == ["mixed", "cliff", "solved", "empty", "a", "b", "c", "d", "e"]
    assert [g.problem.id for g in with_signal(groups, 4, GRPO_OBJECTIVE)] == ["mixed", "b", "d"]


def test_a_full_batch_asks_for_nothing_and_no_round_means_none() -> None:
    def never(turn: int, count: int, leave_out: Collection[str]) -> list[Group]:
        raise AssertionError("nothing is missing")

    full = [MIXED, group("x", 0, 1)]
    assert refilled(full, 3, 2, GRPO_OBJECTIVE, never) == full
    assert refilled([CLIFF], 0, 1, GRPO_OBJECTIVE, never) == [CLIFF]
    assert with_signal([MIXED, *full], 2, GRPO_OBJECTIVE) == [MIXED, MIXED]


def order(seed: int = 0) -> ProblemOrder:
    problems = [Problem(f"{t}/{i}", t, "q", "a") for t, n in (("big", 900), ("small", 100)) for i in range(n)]
    return ProblemOrder(problems, {"big": 1.0, "small": 3.0}, seed)


def test_further_problems_are_new_distinct_shared_out_and_repeatable() -> None:
    batch = {p.id for p in order().batch(5, 40)}
    further = order().further(5, 0, 60, batch)
    ids = [p.id for p in further]
    assert len(set(ids)) == 60 and not batch & set(ids)
    small = sum(p.task == "small" for p in further)
    assert 30 <= small <= 58, "three quarters of the draws"
    assert [p.id for p in order().further(5, 0, 60, batch)] == ids
    assert [p.id for p in order().further(5, 1, 60, batch)] != ids
    assert [p.id for p in order(1).further(5, 0, 60, batch)] != ids


@pytest.mark.parametrize("size", [3, 50])
def test_when_problems_run_out_there_are_fewer(size: int) -> None:
    problems = [Problem(f"t/{i}", "t", "q", "a") for i in range(10)]
    further = ProblemOrder(problems).further(0, 0, size, {f"t/{i}" for i in range(5)})
    assert len(further) == min(size, 5)
