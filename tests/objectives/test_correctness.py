"""What is right is decided by the correctness of a sample; advantages are made of its reward.

Every choice on groups whose rewards hold a bonus is the one on the same groups without it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_groups import group, sample

from megatron_hdpo.evaluation.config import EvaluationConfig
from megatron_hdpo.evaluation.evaluate import Responses, metrics_of
from megatron_hdpo.objectives.base import ObjectiveDeps, group_shares
from megatron_hdpo.objectives.grpo import GRPO, GRPOConfig
from megatron_hdpo.objectives.hdpo import HDPO, HDPOConfig
from megatron_hdpo.objectives.paced import PACED, PACEDConfig
from megatron_hdpo.objectives.siblings import PairConfig, right_siblings, wrong_siblings
from megatron_hdpo.objectives.srpo import SRPO, SRPOConfig
from megatron_hdpo.sampling.step_rollouts import StepRollouts
from megatron_hdpo.types.rollouts import Group, Sample, outline_of

Values = tuple[float, float]
VALUES = st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([-1.0, 0.0, 0.3, 1.0]))
GROUPS = st.tuples(st.lists(VALUES, min_size=1, max_size=5), st.lists(VALUES, max_size=3))


def judged(values: Values, is_summed: bool) -> Sample:
    """A sample whose reward is task + bonus where it is summed, else that of the task alone."""
    task, bonus = values
    made = sample(task, token_ids=[5, 6, 7], text=rf"\boxed{{{task}}}")
    if not is_summed:
        return made
    return replace(made, reward=task + bonus, components={"task": task, "style": bonus}, decided_by="task")


def both(students: list[Values], privileged: list[Values]) -> list[Group]:
    """The same group with the sums as rewards, and with the task's scores alone."""
    return [
        group([judged(v, is_summed) for v in students], [judged(v, is_summed) for v in privileged])
        for is_summed in (True, False)
    ]


def places(found: list[Sample], of: Group) -> list[int]:
    return [index for index, other in enumerate(of.samples) if any(other is one for one in found)]


@given(values=GROUPS)
@settings(max_examples=60, deadline=None)
def test_a_bonus_changes_no_choice(values: tuple[list[Values], list[Values]]) -> None:
    students, privileged = values
    summed, alone = both(students, privileged)
    hdpo, paced, srpo = (
        made(config, ObjectiveDeps())
        for made, config in ((HDPO, HDPOConfig()), (PACED, PACEDConfig()), (SRPO, SRPOConfig()))
    )
    assert hdpo.is_cliff(summed) == hdpo.is_cliff(alone) == all(task == 0 for task, _ in students)
    assert hdpo.is_cliff(outline_of(summed)) == hdpo.is_cliff(alone)
    for threshold in (0.5, 1.0):
        assert group_shares([outline_of(summed)], threshold) == group_shares([alone], threshold)
    assert paced._measured(summed, 0) == paced._measured(alone, 0)
    for index in range(len(students)):
        assert srpo.is_distilled(summed, index) == srpo.is_distilled(alone, index)
        for siblings in (right_siblings, wrong_siblings):
            assert places(siblings(summed, index, PairConfig()), summed) == places(
                siblings(alone, index, PairConfig()), alone
            )
    config = EvaluationConfig(samples=len(students), k=[1])
    shares = [
        metrics_of(config, Responses(StepRollouts([outline_of(g)]), StepRollouts([outline_of(g)])))
        for g in (summed, alone)
    ]
    names = [name for name in shares[1] if "pass@" in name or "greedy" in name]
    assert names and [shares[0][name] for name in names] == [shares[1][name] for name in names]
    kept = [hdpo.keep_privileged(g) for g in both(students, privileged)]
    assert kept[0].dropped == kept[1].dropped
    assert [s.correctness for s in kept[0].privileged_samples] == [s.reward for s in kept[1].privileged_samples]


def test_a_bonus_changes_the_advantages() -> None:
    summed, _ = both([(0.0, 0.0), (0.0, 0.3)], [])
    grpo = GRPO(GRPOConfig(), ObjectiveDeps())
    assert HDPO(HDPOConfig(), ObjectiveDeps()).is_cliff(summed)
    assert grpo.has_signal(summed)
    assert grpo._advantages(summed) == pytest.approx([0.0 - 0.3, 0.3 - 0.0])  # minus the mean of the others


def test_a_sample_without_its_deciding_value_is_an_error() -> None:
    with pytest.raises(KeyError):
        _ = replace(sample(1.0), decided_by="task").correctness
