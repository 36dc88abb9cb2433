"""Table of an evaluation: intervals, sets with other rates, and samples that failed are said, never counted."""

from __future__ import annotations

import numpy as np

from megatron_hdpo.evaluation.evaluate import Responses
from megatron_hdpo.evaluation.files import evaluation_table, rate_text
from megatron_hdpo.sampling.step_rollouts import on_every_rank
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.rollouts import Group


def group(task: str, **dropped: int) -> Group:
    return Group(Problem(f"{task}/0", task, "1+1=", "2"), np.zeros(1, dtype=np.int32), [], dropped=dropped)


METRICS = {
    **{f"eval/{task}/{name}": value for task in ("a", "b") for name, value in (("problems", 1.0), ("samples", 3.0))},
    "eval/a/pass@1": 0.5,
    "eval/a/pass@1_low": 0.25,
    "eval/a/pass@1_high": 0.75,
}


def test_a_rate_that_a_set_lacks_is_a_dash() -> None:
    rows = evaluation_table(METRICS, Responses(on_every_rank([group("a"), group("b")])))
    assert rows == [
        {"set": "a", "problems": "1", "samples": "3", "pass@1": "0.500 (0.250 to 0.750)"},
        {"set": "b", "problems": "1", "samples": "3", "pass@1": "-"},
    ]


def test_samples_that_failed_have_a_column() -> None:
    sampled, greedy = [group("a", check_failed=2), group("b")], [group("a", generation_failed=1), group("b")]
    responses = Responses(on_every_rank(sampled), on_every_rank(greedy))
    assert [row["samples dropped"] for row in evaluation_table(METRICS, responses)] == ["3", "0"]


def test_a_rate_over_fewer_problems_says_so() -> None:
    metrics = METRICS | {"eval/a/problems": 4.0, "eval/a/pass@1_problems": 3.0, "eval/a/accuracy/level-1_low": 0.5}
    (row,) = evaluation_table(metrics, Responses(on_every_rank([group("a")])))
    assert row == {"set": "a", "problems": "4", "samples": "3", "pass@1": "0.500 (0.250 to 0.750), 3 problems"}
    whole = metrics | {"eval/a/pass@1_problems": 4.0}
    assert evaluation_table(whole, Responses(on_every_rank([group("a")])))[0]["pass@1"] == "0.500 (0.250 to 0.750)"


def test_a_rate_without_interval() -> None:
    assert rate_text({"x": 0.5}, "x") == "0.500"
