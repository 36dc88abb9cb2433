"""The coordinator: the same groups in the same order on any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from thread_ranks import PROBLEMS, Context, World, coordinator

from megatron_hdpo.objectives.base import BaseObjective, ObjectiveDeps
from megatron_hdpo.objectives.settings import ObjectiveSettings
from megatron_hdpo.sampling.coordinator import RolloutCoordinator
from megatron_hdpo.sampling.step_rollouts import StepRollouts
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.rollouts import Group, GroupOutline, outline_of


class SecondTry(BaseObjective):
    """Privileged rollouts for the problems named, and of them the first few."""

    def __init__(self, wanted: dict[str, int], bound: int | None = None, top: int = 0, keep: int = 99) -> None:
        self.wanted, self.max_privileged_prompts, self.privileged_top_logprobs = wanted, bound, top
        self.keep = keep
        self.asked: list[tuple[str, int, int]] = []

    def privileged_rollouts_for(self, group: Group, step: int) -> int:
        self.asked.append((group.problem.id, len(group.samples) + sum(group.dropped.values()), step))
        return self.wanted.get(group.problem.answer, 0)

    def keep_privileged(self, group: Group) -> Group:
        group.dropped["over"] = len(group.privileged_samples[self.keep :])
        group.privileged_samples = group.privileged_samples[: self.keep]
        return group


def contents(groups: Sequence[Group]) -> list[Any]:
    return [
        (g.problem.id, g.prompt_ids.tolist(), g.dropped, [(s.text, s.reward) for s in g.samples],
         None if g.privileged_prompt_ids is None else g.privileged_prompt_ids.tolist(),
         [(s.text, s.reward) for s in g.privileged_samples])
        for g in groups
    ]  # fmt: skip


def joined(parts: Sequence[dict[int, Any]]) -> list[Any]:
    """What the ranks hold, in the order of the problems; no two hold the same."""
    assert sum(map(len, parts)) == len({index for part in parts for index in part})
    return [content for _, content in sorted(item for part in parts for item in part.items())]


def held(rollouts: StepRollouts) -> dict[int, Any]:
    return dict(zip(rollouts.held, contents(list(rollouts.held.values())), strict=True))


def whole_step(context: Any) -> tuple[list[GroupOutline], dict[int, Any]]:
    def unlucky(request: Any, index: int) -> bool:
        return request.prompt_ids[1] == 2 and index == 0

    rollouts = coordinator(context, unlucky)
    step = rollouts.step(PROBLEMS, 4, SecondTry({"1": 2, "2": 4}, bound=context.bound))  # type: ignore[arg-type]
    assert all(step.outlines[index] == outline_of(group) for index, group in step.held.items())
    return step.outlines, held(step)


@pytest.mark.parametrize("bound", [None, 5, 2], ids=["unbounded", "loose", "binding"])
@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_any_number_of_ranks_makes_the_same_step(ranks: int, bound: int | None) -> None:
    outlines, whole = World(1, bound).run(whole_step)[0]
    alone = joined([whole])
    assert [group[0] for group in alone] == [problem.id for problem in PROBLEMS]
    assert alone[2][2]["generation_failed"] == 1 and alone[2][2]["privileged_generation_failed"] == 1
    assert len(alone[1][5]) + alone[1][2].get("privileged_check_failed", 0) == 2
    found = World(ranks, bound).run(whole_step)
    assert [part for part, _ in found] == [outlines] * ranks, "every rank knows the whole step"
    assert joined([part for _, part in found]) == alone, "and each group is on the rank that sampled it, alone"


def test_each_request_goes_to_one_rank() -> None:
    def asked(context: Any) -> list[str]:
        rollouts = coordinator(context)
        rollouts.step(PROBLEMS, 0, BaseObjective(ObjectiveSettings(), ObjectiveDeps()))
        return [request.request_id for request in rollouts.sampler.engine.seen]  # type: ignore[attr-defined]

    asked_of = World(2).run(asked)
    assert [len(ids) for ids in asked_of] == [3, 2]
    assert len({id for ids in asked_of for id in ids}) == 5


def seeds(purpose: Any, seed: int = 3, problems: Sequence[Problem] = PROBLEMS) -> list[int]:
    rollouts = coordinator(World(1) and Context(World(1), 0), seed=seed)
    purpose(rollouts, problems)
    return [request.seed for request in rollouts.sampler.engine.seen]  # type: ignore[attr-defined]


def student(step: int) -> Any:
    return lambda rollouts, problems: rollouts.step(problems, step, BaseObjective(ObjectiveSettings(), ObjectiveDeps()))


def privileged(rollouts: RolloutCoordinator, problems: Sequence[Problem]) -> None:
    rollouts.step(problems, 0, SecondTry({problem.answer: 1 for problem in problems}))  # type: ignore[arg-type]


def test_seeds_depend_on_run_step_purpose_and_problem_only() -> None:
    assert seeds(student(0)) == seeds(student(0))
    assert seeds(student(0), problems=PROBLEMS[::-1]) == seeds(student(0))[::-1]
    every = [*seeds(student(0)), *seeds(student(1)), *seeds(student(0), seed=4), *seeds(privileged)]
    assert len(every) == 25 and len(set(every)) == 20  # the students of the last are those of the first


def test_privileged_rollouts_use_the_privileged_prompt_and_the_filter() -> None:
    rollouts = coordinator(Context(World(1), 0))
    objective = SecondTry({"3": 4}, top=5, keep=1)
    step = rollouts.step(PROBLEMS, 6, objective)  # type: ignore[arg-type]
    groups = [step.held[index] for index in range(5)]
    (request,) = [r for r in rollouts.sampler.engine.seen if "privileged" in r.request_id]  # type: ignore[attr-defined]
    assert request.prompt_ids.tolist() == [2, 3, 9]
    assert (request.sampling.n, request.sampling.top_logprobs, request.sampling.stop_token_ids) == (4, 5, (1,))
    experts = [r.sampling.routed_experts for r in rollouts.sampler.engine.seen]  # type: ignore[attr-defined]
    assert not request.sampling.routed_experts and sum(experts) == len(PROBLEMS), "of students alone"
    assert [len(group.privileged_samples) for group in groups] == [0, 0, 0, 1, 0]
    assert groups[3].dropped["over"] + groups[3].dropped.get("privileged_check_failed", 0) == 3
    assert [group.privileged_prompt_ids is None for group in groups] == [True, True, True, False, True]
    assert sorted(objective.asked) == [(problem.id, 3, 6) for problem in PROBLEMS], "asked once, of complete groups"


@pytest.mark.parametrize(("bound", "expected"), [(0, []), (1, [0]), (2, [0, 2]), (9, [0, 2, 3])])
def test_a_bound_takes_the_first_groups_that_want_a_second_try(bound: int, expected: list[int]) -> None:
    def taught(context: Any) -> list[int]:
        objective = SecondTry({"0": 1, "2": 1, "3": 1}, bound)
        step = coordinator(context).step(PROBLEMS, 0, objective)  # type: ignore[arg-type]
        own = [g for g, group in step.held.items() if group.privileged_prompt_ids is not None]
        every = [g for g, outline in enumerate(step.outlines) if outline.privileged_prompt_length]
        assert own == [g for g in every if g in step.held]
        return every

    assert World(2).run(taught) == [expected] * 2


def test_a_rank_without_a_deterministic_engine_waits_as_the_others_do() -> None:
    """A rank that has no server cannot know whether those of the others are deterministic."""

    def second_tries(context: Any) -> list[int]:
        rollouts = coordinator(context, deterministic=context.rank == 1)
        rollouts.sampling_ranks = [1]
        step = rollouts.step(PROBLEMS, 0, SecondTry({"1": 2}))  # type: ignore[arg-type]
        return [outline.privileged_prompt_length for outline in step.outlines]

    assert World(2).run(second_tries) == [[0, 3, 0, 0, 0]] * 2


def test_ranks_that_do_not_sample_get_the_outlines_and_no_group() -> None:
    def one_samples(context: Any) -> tuple[int, StepRollouts]:
        rollouts = coordinator(context)
        rollouts.sampling_ranks = [1]
        step = rollouts.step(PROBLEMS, 0, SecondTry({"1": 2}))  # type: ignore[arg-type]
        return len(rollouts.sampler.engine.seen), step  # type: ignore[attr-defined]

    (none, first), (all_, second) = World(2).run(one_samples)
    assert (none, all_) == (0, 6)
    assert first.outlines == second.outlines and first.holders == second.holders == [1] * 5
    assert (first.held, sorted(second.held)) == ({}, [0, 1, 2, 3, 4])
