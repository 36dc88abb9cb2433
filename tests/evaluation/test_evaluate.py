"""Evaluation: pass@k against counting by hand, failed samples left out, the same seeds every time."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from fake_engine import FakeEngine
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_ranks import PROBLEMS, Context, World, coordinator

from megatron_hdpo.evaluation.config import EvaluationConfig
from megatron_hdpo.evaluation.evaluate import evaluate
from megatron_hdpo.objectives.base import BaseObjective, ObjectiveDeps
from megatron_hdpo.objectives.settings import ObjectiveSettings
from megatron_hdpo.sampling.step_rollouts import StepRollouts, on_every_rank
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.rollouts import Completion, Group, Sample, SamplingParams

Rewards = list[list[float]]


def problems(counts: list[int], task: str = "task") -> list[Problem]:
    return [Problem(id=f"{task}/{i}", task=task, question=str(i), answer="!") for i in range(len(counts))]


def sample(reward: float, length: int = 3) -> Sample:
    ids = np.zeros(length, dtype=np.int32)
    return Sample(Completion(ids, ids.astype(np.float32), "stop", ids), "", reward)


class Known:
    """A coordinator that hands over known rewards and remembers what it was asked for."""

    class Config:
        max_new_tokens = 11

    config, stop_token_ids = Config(), (1, 2)

    def __init__(self, sampled: Rewards, greedy: Rewards) -> None:
        self.rewards = {"evaluation": sampled, "greedy": greedy}
        self.asked: dict[Any, SamplingParams] = {}

    def groups(self, problems: list[Problem], sampling: SamplingParams, purpose: Any, progress: Any) -> StepRollouts:
        self.asked[purpose] = sampling
        rewards = self.rewards[purpose[0]]
        groups = [
            Group(p, np.zeros(1, dtype=np.int32), [sample(r) for r in rewards[i]], dropped={"check_failed": 9})
            for i, p in enumerate(problems)
        ]
        return on_every_rank(groups)


def metrics(sampled: Rewards, greedy: Rewards | None = None, **keys: Any) -> dict[str, float]:
    config = EvaluationConfig(**({"samples": 4, "k": [1, 2, 4], "greedy": greedy is not None} | keys))
    return evaluate(config, problems([0] * len(sampled)), Known(sampled, greedy or []))  # type: ignore[arg-type]


def by_counting(rewards: Rewards, k: int) -> float:
    """Share of all subsets of k samples with a right one, averaged over problems with at least k samples."""
    shares = [np.mean([max(s) >= 1 for s in combinations(group, k)]) for group in rewards if len(group) >= k]
    return float(np.mean(shares))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from([0.0, 1.0, 0.5]), min_size=0, max_size=4), min_size=1, max_size=5))
def test_pass_at_k_is_the_share_of_subsets(rewards: Rewards) -> None:
    found = metrics(rewards)
    for k in (1, 2, 4):
        name = f"eval/task/pass@{k}"
        if any(len(group) >= k for group in rewards):
            assert found[name] == pytest.approx(by_counting(rewards, k))
        else:
            assert name not in found  # not 0: nothing is known
    judged = [reward for group in rewards for reward in group]
    assert found["eval/task/samples"] == len(judged) and found["eval/task/problems"] == len(rewards)
    assert found.get("eval/task/reward_mean") == (pytest.approx(np.mean(judged)) if judged else None)


def test_a_failed_sample_is_not_a_wrong_one() -> None:
    assert metrics([[1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])["eval/task/pass@1"] == 0.5
    assert metrics([[1.0], []])["eval/task/pass@1"] == 1.0


def test_every_share_has_an_interval() -> None:
    found = metrics([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]], [[1.0], [0.0], [0.0]], samples=2, k=[1, 2])
    for name in ("pass@1", "pass@2", "greedy"):
        value, low, high = (found[f"eval/task/{name}{end}"] for end in ("", "_low", "_high"))
        assert 0.0 <= low <= value <= high <= 1.0 and low < high


def test_greedy() -> None:
    known = Known([[0.0]] * 4, [[1.0], [0.0], [], [1.0]])
    config = EvaluationConfig(samples=1, k=[1], temperature=0.7, top_p=0.9)
    found = evaluate(config, problems([0] * 4), known)  # type: ignore[arg-type]
    assert found["eval/task/greedy"] == pytest.approx(2 / 3)
    assert known.asked[("greedy",)] == SamplingParams(11, n=1, temperature=0.0, stop_token_ids=(1, 2))
    sampled = SamplingParams(11, n=1, temperature=0.7, top_p=0.9, stop_token_ids=(1, 2))
    assert known.asked[("evaluation",)] == sampled
    assert "eval/task/greedy" not in metrics([[1.0]])


def test_threshold_and_length_limit() -> None:
    known = Known([[0.5, 0.4, 0.6, 0.0]], [])
    config = EvaluationConfig(samples=4, k=[1], success_threshold=0.5, greedy=False, max_new_tokens=5)
    assert evaluate(config, problems([0]), known)["eval/task/pass@1"] == 0.5  # type: ignore[arg-type]
    assert known.asked[("evaluation",)].max_new_tokens == 5


def test_tasks_apart() -> None:
    both = problems([0], "easy") + problems([0], "hard")
    found = evaluate(EvaluationConfig(samples=1, k=[1], greedy=False), both, Known([[1.0], [0.0]], []))  # type: ignore[arg-type]
    assert (found["eval/easy/pass@1"], found["eval/hard/pass@1"]) == (1.0, 0.0)


def test_seeds_are_the_same_every_time_and_unlike_those_of_training() -> None:
    def seeds(version: int) -> list[int]:
        rollouts = coordinator(Context(World(1), 0))
        engine = rollouts.sampler.engine
        assert isinstance(engine, FakeEngine)
        engine.weight_version = version
        evaluate(EvaluationConfig(samples=2, k=[1]), PROBLEMS, rollouts)
        return [request.seed for request in engine.seen]

    training = coordinator(Context(World(1), 0))
    training.sample_step(PROBLEMS, 0, BaseObjective(ObjectiveSettings(), ObjectiveDeps()))
    assert seeds(1) == seeds(5) and len(set(seeds(1))) == 2 * len(PROBLEMS)
    assert not set(seeds(1)) & {request.seed for request in training.sampler.engine.seen}  # type: ignore[attr-defined]
