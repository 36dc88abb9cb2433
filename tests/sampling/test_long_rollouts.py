"""Rollouts that take longer than a collective may wait, on one rank of several."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from distributed_helper import run_ranks
from fake_engine import FakeEngine
from thread_ranks import PROBLEMS, coordinator

from megatron_hdpo.objectives.base import BaseObjective, ObjectiveDeps
from megatron_hdpo.objectives.settings import ObjectiveSettings
from megatron_hdpo.parallel.context import start
from megatron_hdpo.parallel.layout import ParallelConfig
from megatron_hdpo.types.rollouts import GenerationResult, SamplingParams

COLLECTIVE_S, ROLLOUTS_S = 2.0, 3.5


class SlowEngine(FakeEngine):
    def results(self) -> Iterator[GenerationResult]:
        time.sleep(ROLLOUTS_S)
        yield from super().results()


def step_and_evaluation(slow: int) -> list[list[str]]:
    context = start(ParallelConfig(timeout_minutes=COLLECTIVE_S / 60), "cpu")
    sampling = coordinator(context)
    sampling.sampling_ranks = [slow]
    sampling.sampler.engine = SlowEngine()
    step = sampling.step(PROBLEMS, 1, BaseObjective(ObjectiveSettings(), ObjectiveDeps()))
    evaluation = sampling.groups(PROBLEMS, SamplingParams(8), ("evaluation",))
    return [[outline.problem.id for outline in rollouts.outlines] for rollouts in (step, evaluation)]


@pytest.mark.parametrize(("ranks", "slow"), [(2, 0), (4, 3)])
@pytest.mark.fault(
    "one rank samples for longer than a collective may wait",
    phase="sampling, evaluation",
    seen="a line that says who is waited for",
    lost="nothing",
)
def test_ranks_wait_for_rollouts_and_evaluations_of_another_rank(ranks: int, slow: int) -> None:
    assert run_ranks(ranks, step_and_evaluation, slow) == [[[problem.id for problem in PROBLEMS]] * 2] * ranks
