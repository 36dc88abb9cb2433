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
from megatron_hdpo.evaluation.evaluate import evaluate, metrics_of, remarks, sample_responses
from megatron_hdpo.evaluation.parts import MOST_PARTS
from megatron_hdpo.objectives.base import BaseObjective, ObjectiveDeps
from megatron_hdpo.objectives.settings import ObjectiveSettings
from megatron_hdpo.sampling.step_rollouts import StepRollouts, on_every_rank
from megatron_hdpo.tracking.metrics import check_name
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
        self.calls: list[tuple[int, list[str]]] = []

    def groups(self, problems: list[Problem], sampling: SamplingParams, purpose: Any, progress: Any) -> StepRollouts:
        """The rewards of a problem are those at the number in its id; what is missing of n has failed."""
        self.asked[purpose] = sampling
        self.calls.append((sampling.n, [p.id for p in problems]))
        found = [self.rewards[purpose[0]][int(p.id.rpartition("/")[2])] for p in problems]
        groups = [
            Group(p, np.zeros(1, dtype=np.int32), [sample(r) for r in rewards], dropped=failed(sampling.n, rewards))
            for p, rewards in zip(problems, found, strict=True)
        ]
        return on_every_rank(groups)


def failed(n: int, rewards: list[float]) -> dict[str, int]:
    """The first missing sample failed its check, the others were not generated."""
    missing = n - len(rewards)
    return {"check_failed": 1, "generation_failed": missing - 1} if missing else {}


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
        assert found[f"{name}_problems"] == sum(len(group) >= k for group in rewards)
    judged = [reward for group in rewards for reward in group]
    lost = found["eval/task/check_failed"] + found["eval/task/generation_failed"]
    assert lost == 4 * len(rewards) - len(judged)
    assert found["eval/task/check_failed"] == sum(len(group) < 4 for group in rewards)
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
    both = [numbered("easy", 0), numbered("hard", 1)]
    found = evaluate(EvaluationConfig(samples=1, k=[1], greedy=False), both, Known([[1.0], [0.0]], []))  # type: ignore[arg-type]
    assert (found["eval/easy/pass@1"], found["eval/hard/pass@1"]) == (1.0, 0.0)


def numbered(task: str, index: int, level: str | None = None, source: str | None = None) -> Problem:
    return Problem(f"{task}/{index}", task, str(index), "!", level=level, source=source)


def test_a_hard_problem_that_lost_a_sample_does_not_leave_silently() -> None:
    """Two problems of 8 samples, the hard one with 7 of them: pass@8 is over the easy one alone, and that is said."""
    lines: list[str] = []
    known, pair = Known([[1.0] * 8, [0.0] * 7], []), problems([0, 0])
    config = EvaluationConfig(samples=8, k=[1, 8], greedy=False)
    found = evaluate(config, pair, known, inspect=lambda r: lines.extend(remarks(config, r, "boom")))  # type: ignore[arg-type]
    assert (found["eval/task/pass@1"], found["eval/task/pass@1_problems"]) == (0.5, 2)
    assert (found["eval/task/pass@8"], found["eval/task/pass@8_problems"]) == (1.0, 1)
    assert lines == [
        "evaluation of task: 1 of 16 samples failed and were left out, most often: boom; "
        "of 2 problems: pass@1 over 2, pass@8 over 1"
    ]


def test_where_nothing_failed_nothing_is_said() -> None:
    config = EvaluationConfig(samples=2, k=[1], greedy=True)
    known = Known([[1.0, 0.0]], [[1.0]])
    assert remarks(config, sample_responses(config, problems([0]), known), "no error") == []  # type: ignore[arg-type]


def test_tasks_with_samples_of_their_own() -> None:
    """Order is kept, whichever way the tasks are mixed, and k that a task has no samples for are left out."""
    mixed = [numbered("maths", 0), numbered("logic", 1), numbered("maths", 2), numbered("logic", 3)]
    known = Known([[1.0, 0.0, 0.0, 0.0], [1.0], [0.0] * 4, [1.0]], [])
    config = EvaluationConfig(samples=4, k=[1, 4], task_samples={"logic": 1}, greedy=False, top_k=20)
    responses = sample_responses(config, mixed, known)  # type: ignore[arg-type]
    assert [group.problem.id for group in responses.sampled.outlines] == [problem.id for problem in mixed]
    assert [list(responses.sampled.held[i].problem.id for i in range(4))] == [[problem.id for problem in mixed]]
    assert known.calls == [(4, ["maths/0", "maths/2"]), (1, ["logic/1", "logic/3"])]
    assert known.asked[("evaluation",)].top_k == 20
    found = metrics_of(config, responses)
    assert (found["eval/maths/pass@1"], found["eval/maths/pass@4"], found["eval/logic/pass@1"]) == (0.125, 0.5, 1.0)
    assert "eval/logic/pass@4" not in found and "eval/logic/pass@4_problems" not in found


def test_k_beyond_all_samples_is_refused() -> None:
    assert EvaluationConfig(samples=1, k=[12], task_samples={"maths": 12}).ks_of("maths") == [12]
    with pytest.raises(ValueError, match="cannot be estimated from samples=12"):
        EvaluationConfig(samples=1, k=[13], task_samples={"maths": 12})
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        EvaluationConfig(task_samples={"maths": 0})


levels = st.lists(
    st.tuples(st.sampled_from([None, "1", "2", "Level 2", "é"]), st.integers(0, 4)), min_size=1, max_size=6
)


@settings(max_examples=60, deadline=None)
@given(levels)
def test_accuracy_by_level_and_source(rows: list[tuple[str | None, int]]) -> None:
    names = {"1": "1", "2": "2", "Level 2": "Level_2", "é": "other"}
    asked = [numbered("task", i, level, None if level is None else f"of {level}") for i, (level, _) in enumerate(rows)]
    known = Known([[1.0] * right + [0.0] * (4 - right) for _, right in rows], [])
    found = evaluate(EvaluationConfig(samples=4, k=[1], greedy=False), asked, known)  # type: ignore[arg-type]
    for level, name in names.items():
        shares = [right / 4 for own, right in rows if own == level]
        metric = f"eval/task/accuracy/level-{name}"
        assert found.get(metric) == (pytest.approx(np.mean(shares)) if shares else None)
        assert found.get(f"{metric}_problems") == (len(shares) if shares else None)
    sources = {name for name in found if "/accuracy/source-" in name and not name.endswith(("_low", "_high", "s"))}
    assert len(sources) == len({level for level, _ in rows if level is not None})
    for name in found:
        check_name(name)


def test_too_many_levels_are_said_and_left_out() -> None:
    asked = [numbered("task", i, f"{i}.5") for i in range(MOST_PARTS + 1)]
    config = EvaluationConfig(samples=1, k=[1], greedy=False)
    responses = sample_responses(config, asked, Known([[1.0]] * len(asked), []))  # type: ignore[arg-type]
    assert not [name for name in metrics_of(config, responses) if "accuracy" in name]
    assert remarks(config, responses, "") == [
        "evaluation of task: 51 values of level are too many for an accuracy of each"
    ]


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
