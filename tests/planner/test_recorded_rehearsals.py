"""The plan against the program: the rehearsals in benchmarks/rehearsal.json are recorded, the plan is made anew."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from _rehearsal.planned import Line, last
from _rehearsal.record import compared, rank_of, read_records
from bench_rehearsal import CASES, EXAMPLES, RECORDS, asked_of
from recipes import ROOT

RECORDED = read_records(RECORDS)
ENDED = [name for name, record in RECORDED.items() if record["rank"]["failure"] is None]
MEMORY_ERROR = 0.02
LAUNCHES_ERROR = 0.1
MEGATRONS = "megatron/core/transformer/moe/"
"""Place of the host waits that Megatron's dispatcher of tokens makes."""
AFTER_BACKWARD = ("megatron_hdpo/model/gradient_norm.py", "megatron_hdpo/model/step_metrics.py")


@cache
def plan_of(name: str) -> list[Line]:
    return compared(RECORDED[name])


def test_records_are_those_of_the_cases_as_they_are() -> None:
    """A recipe that changes is rehearsed again; one that is new is entered, in bench_rehearsal."""
    asked = {name: [json.loads(json.dumps(vars(one))) for one in asked_of(CASES[name], "both", 4)] for name in CASES}
    for name, record in RECORDED.items():
        case = next(case for case in CASES if name.startswith(f"{case}, "))
        assert record["asked"] | {"micro_batches": 4} in asked[case]
    assert {path.parent.name for path in ROOT.glob("examples/qwen*/hdpo.yaml")} == set(EXAMPLES)
    assert len(ENDED) >= 6


@pytest.mark.parametrize("name", ENDED)
def test_memory_is_planned_within_two_per_cent(name: str) -> None:
    errors = {line.what: line.error for line in plan_of(name) if line.what.startswith("memory")}
    assert {"memory at rest", "memory, peak of train"} <= errors.keys()
    wrong = {what: error for what, error in errors.items() if error is None or abs(error) > MEMORY_ERROR}
    assert not wrong


@pytest.mark.parametrize("name", ENDED)
def test_collectives_and_products_are_planned_exactly(name: str) -> None:
    exact = [line for line in plan_of(name) if line.of_collective or line.unit == "FLOP"]
    assert exact and not [line for line in exact if line.planned != pytest.approx(line.rehearsed, rel=1e-12)]


@pytest.mark.parametrize("name", ENDED)
def test_launches_of_training_are_planned_within_a_tenth(name: str) -> None:
    (error,) = (line.error for line in plan_of(name) if line.what == "train: kernels launched")
    assert error is not None and abs(error) < LAUNCHES_ERROR


@pytest.mark.parametrize("name", ENDED)
def test_a_step_waits_for_the_gpu_only_after_its_last_backward_pass(name: str) -> None:
    """Experts apart: Megatron reads how many tokens each one gets."""
    train: Any = last(rank_of(RECORDED[name]), "train")
    ours = {place: count for place, count in train["waits"].items() if not place.startswith(MEGATRONS)}
    assert all(place.startswith(AFTER_BACKWARD) for place in ours), ours
    assert sum(ours.values()) <= len(AFTER_BACKWARD)
