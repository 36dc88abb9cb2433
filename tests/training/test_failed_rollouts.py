"""Rollouts that fail are reported with their reason; a run that has nothing to learn from ends."""

from __future__ import annotations

import pytest

from megatron_hdpo.model.policy import TrainingError
from megatron_hdpo.sampling.failures import Failure, most_frequent
from megatron_hdpo.training.failed_rollouts import FailedRollouts
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.rollouts import GroupOutline, SampleOutline


def group(samples: int, **dropped: int) -> GroupOutline:
    sample = SampleOutline(1.0, 2, "stop", (0, 0), 0, -1.0, 1.0, {})
    return GroupOutline(Problem("task/1", "task", "q", "a"), 3, (sample,) * samples, dropped=dropped)


def test_a_warning_beyond_the_share_and_the_end_after_empty_steps() -> None:
    warnings: list[str] = []
    watch = FailedRollouts(0.25, 2, warnings.append)
    watch.watch(1, [group(3, check_failed=1), group(4, stopped_early=9)], "KeyError")
    assert not warnings
    watch.watch(2, [group(3, privileged_check_failed=1, generation_failed=1)], "KeyError: 'x' (2 x)")
    assert len(warnings) == 1 and warnings[0].startswith("step 2: 2 of 5 rollouts failed")
    assert "KeyError: 'x' (2 x)" in warnings[0]
    watch.watch(3, [group(0, check_failed=4)], "KeyError")
    watch.watch(4, [group(1, check_failed=3)], "KeyError")
    watch.watch(5, [group(0, check_failed=4)], "KeyError")
    with pytest.raises(TrainingError, match=r"no rollout of the last 2 steps could be used; in step 6 .*: dead"):
        watch.watch(6, [group(0, generation_failed=4)], "dead")


def test_the_most_frequent_error_of_all_ranks() -> None:
    ranks = [[Failure("a", 3), Failure("b", 2)], [], [Failure("b", 2)]]
    assert most_frequent(ranks) == "b (4 x)"
    assert most_frequent([[], []]) == "no error was reported"
