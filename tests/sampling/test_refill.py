"""Dynamic sampling: groups without signal make room for further problems, and only those."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import pytest
from thread_ranks import Context, World

from megatron_hdpo.data.order import ProblemOrder
from megatron_hdpo.objectives.base import ObjectiveDeps
from megatron_hdpo.objectives.grpo import GRPO, GRPOConfig
from megatron_hdpo.sampling.refill import refilled, with_signal
from megatron_hdpo.sampling.step_rollouts import StepRollouts, gather_outlines, on_every_rank
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.rollouts import Completion, Group, Sample

ALONE: Any = Context(World(1), 0)
GRPO_OBJECTIVE = GRPO(GRPOConfig(), ObjectiveDeps())


def group(name: str, *rewards: float) -> Group:
    ids = np.array([3, 4], dtype=np.int32)
    completion = Completion(ids, np.zeros(2, np.float32), "stop", np.zeros(2, np.int32))
    return Group(Problem(name, "t", "q", "a"), ids, [Sample(completion, "", reward) for reward in rewards])


def ids(rollouts: StepRollouts) -> list[str]:
    return [outline.problem.id for outline in rollouts.outlines]


MIXED, CLIFF, SOLVED, EMPTY = group("mixed", 1, 0), group("cliff", 0, 0), group("solved", 1, 1), group("empty")


def test_each_round_replaces_what_is_still_without_signal() -> None:
    asked: list[tuple[int, int, set[str]]] = []
    answers = [[group("a", 0, 0), group("b", 1, 0), group("c", 1, 1)], [group("d", 0, 1), group("e", 0, 0)]]

    def more(turn: int, count: int, leave_out: Collection[str]) -> StepRollouts:
        asked.append((turn, count, set(leave_out)))
        return on_every_rank(answers[turn])

    rollouts = refilled(on_every_rank([MIXED, CLIFF, SOLVED, EMPTY]), 2, 4, GRPO_OBJECTIVE, ALONE, more)
    assert asked == [
        (0, 3, {"mixed", "cliff", "solved", "empty"}),
        (1, 2, {"mixed", "cliff", "solved", "empty", "a", "b", "c"}),
    ]
    assert ids(rollouts) == ["mixed", "cliff", "solved", "empty", "a", "b", "c", "d", "e"]
    assert ids(with_signal(rollouts, 4, GRPO_OBJECTIVE, ALONE)) == ["mixed", "b", "d"]


def test_a_full_batch_asks_for_nothing_and_no_round_means_none() -> None:
    def never(turn: int, count: int, leave_out: Collection[str]) -> StepRollouts:
        raise AssertionError("nothing is missing")

    full = on_every_rank([MIXED, group("x", 0, 1)])
    assert refilled(full, 3, 2, GRPO_OBJECTIVE, ALONE, never) is full
    assert ids(refilled(on_every_rank([CLIFF]), 0, 1, GRPO_OBJECTIVE, ALONE, never)) == ["cliff"]
    assert ids(with_signal(on_every_rank([MIXED]) + full, 2, GRPO_OBJECTIVE, ALONE)) == ["mixed", "mixed"]


def test_groups_that_several_ranks_hold_are_replaced_and_chosen_as_on_one() -> None:
    """Each rank knows the signal of its own groups; rounds, further problems and the choice are the same everywhere."""
    first, further = [MIXED, CLIFF, SOLVED, EMPTY], [group("a", 0, 0), group("b", 1, 0), group("c", 1, 1)]

    def dealt(groups: list[Group], context: Any) -> StepRollouts:
        own = {i: g for i, g in enumerate(groups) if i % context.world_size == context.rank}
        return gather_outlines(own, context, [g.problem for g in groups])

    def chosen(context: Any) -> tuple[list[str], list[str]]:
        more = lambda turn, count, leave_out: dealt(further[:count], context)  # noqa: E731
        rollouts = refilled(dealt(first, context), 1, 4, GRPO_OBJECTIVE, context, more)
        kept = with_signal(rollouts, 4, GRPO_OBJECTIVE, context)
        assert all(ids(kept)[index] == held.problem.id for index, held in kept.held.items())
        return ids(kept), [held.problem.id for held in kept.held.values()]

    found = World(3).run(chosen)
    assert [names for names, _ in found] == [["mixed", "b"]] * 3
    assert sorted(name for _, held in found for name in held) == ["b", "mixed"]


def order(seed: int = 0) -> ProblemOrder:
    problems = [Problem(f"{t}/{i}", t, "q", "a") for t, n in (("big", 900), ("small", 100)) for i in range(n)]
    return ProblemOrder(problems, {"big": 1.0, "small": 3.0}, seed)


def test_further_problems_are_new_distinct_shared_out_and_repeatable() -> None:
    batch = {p.id for p in order().batch(5, 40)}
    further = order().further(5, 0, 60, batch)
    drawn = [p.id for p in further]
    assert len(set(drawn)) == 60 and not batch & set(drawn)
    small = sum(p.task == "small" for p in further)
    assert 30 <= small <= 58, "three quarters of the draws"
    assert [p.id for p in order().further(5, 0, 60, batch)] == drawn
    assert [p.id for p in order().further(5, 1, 60, batch)] != drawn
    assert [p.id for p in order(1).further(5, 0, 60, batch)] != drawn


@pytest.mark.parametrize("size", [3, 50])
def test_when_problems_run_out_there_are_fewer(size: int) -> None:
    problems = [Problem(f"t/{i}", "t", "q", "a") for i in range(10)]
    further = ProblemOrder(problems).further(0, 0, size, {f"t/{i}" for i in range(5)})
    assert len(further) == min(size, 5)
