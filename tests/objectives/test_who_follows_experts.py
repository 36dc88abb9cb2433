"""Which forward passes follow the engine's experts: the policy's, of what the engine sampled after the same prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rollout_groups import group, sample, top

from megatron_hdpo.objectives.akl import AKLConfig, build_akl
from megatron_hdpo.objectives.base import ObjectiveDeps
from megatron_hdpo.objectives.distillation import Distillation, StudentDistillationConfig
from megatron_hdpo.objectives.grpo import GRPO, GRPOConfig, KLConfig
from megatron_hdpo.objectives.hdpo import HDPO, HDPOConfig
from megatron_hdpo.objectives.opd import SampledConfig, SampledDistillation
from megatron_hdpo.types.learning import DivergenceConfig, Score
from megatron_hdpo.types.rollouts import Group, Sample


def routed(made: Sample, prompt: int) -> Sample:
    """With experts that no other rollout has."""
    experts = made.completion.token_ids[0] + np.zeros((prompt + made.length - 1, 2, 2), dtype=np.uint16)
    made.completion = replace(made.completion, routed_experts=experts)
    return made


def rollouts() -> Group:
    """Privileged ones have experts too here: they saw another prompt than the policy will."""
    students = [routed(sample(float(i == 0), 3 + i), 3) for i in range(3)]
    return group(students, [routed(sample(1.0, 4), 4)])


class SamePrompt(Distillation):
    """The smallest method of its kind."""

    def teacher_context(self, group: Group, index: int) -> np.ndarray:
        return np.array([9, 9], dtype=np.int32)


STUDENT_SUPPORT = DivergenceConfig(support="student", top_k=3, importance_cap=2.0)
METHODS: dict[str, Any] = {
    "grpo": GRPO(GRPOConfig(kl=KLConfig(coefficient=0.1)), ObjectiveDeps(1.0, 2)),
    "hdpo": HDPO(HDPOConfig(distill=DivergenceConfig(support="student", top_k=3)), ObjectiveDeps(1.0, 2)),
    "distillation": SamePrompt(StudentDistillationConfig(distill=STUDENT_SUPPORT), ObjectiveDeps(1.0, 2)),
    "opd": SampledDistillation(SampledConfig(), ObjectiveDeps(1.0, 2)),
    "teacher's tokens": build_akl(AKLConfig(tokens="teacher"), ObjectiveDeps(1.0, 2)),
}


def expected(place: tuple[int, str, int], weights: str, made: Group) -> np.ndarray | None:
    if place[1] == "privileged" or weights != "policy":
        return None
    return made.samples[place[2]].completion.routed_experts


def answers(scorings: Any) -> Iterator[tuple[Any, Score]]:
    for scoring in scorings:
        length = len(scoring.response_ids)
        zeros = np.zeros(length, dtype=np.float32)
        tops = top(length, scoring.top_k) if scoring.top_k else None
        at = np.full((length, 3), -1.5, dtype=np.float32) if scoring.at else None
        yield scoring.key, Score(zeros, zeros, tops, at)


@pytest.mark.parametrize("name", METHODS)
def test_who_follows_the_engines_experts(name: str) -> None:
    method, made = METHODS[name], rollouts()
    scorings = method.scorings([made])
    followed = 0
    for scoring in scorings:
        wanted = expected(scoring.key[:3], scoring.role, made)
        assert scoring.routed_experts is wanted, scoring.key
        followed += wanted is not None
    assert followed or name == "teacher's tokens"
    examples = method.examples([made], dict(answers(scorings)))
    by_response = {tuple(s.completion.token_ids): s.completion.routed_experts for s in made.samples}
    assert examples
    for example in examples:
        assert example.routed_experts is by_response.get(tuple(example.response_ids))
