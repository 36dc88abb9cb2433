"""A run is not resumed on other problems without a word."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_hdpo.training.load_data import fingerprint
from megatron_hdpo.training.start import _check_data
from megatron_hdpo.types.errors import DataError
from megatron_hdpo.types.problem import Problem

PROBLEMS = [Problem(f"task/{i}", "task", f"question {i}", str(i)) for i in range(3)]
STATE = {"step": 1, "tensor_parallel": 1, "pipeline_parallel": 1, "architecture": {}}


def run_on(problems: list[Problem], accepts: bool = False) -> Any:
    warnings: list[str] = []
    return SimpleNamespace(
        checkpoints=SimpleNamespace(data=fingerprint(problems)),
        recipe=SimpleNamespace(output=Path("runs/it")),
        accept_changes=accepts,
        console=SimpleNamespace(warn=warnings.append, warnings=warnings),
    )


@pytest.fixture
def latest(tmp_path: Path) -> Path:
    (tmp_path / "run_state.json").write_text(json.dumps(STATE | {"data": fingerprint(PROBLEMS)}))
    return tmp_path


CHANGED = {
    "fewer": PROBLEMS[:2],
    "another order": PROBLEMS[::-1],
    "another answer": [*PROBLEMS[:2], Problem("task/2", "task", "question 2", "3")],
    "more": [*PROBLEMS, Problem("task/3", "task", "question 3", "3")],
}


@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.fault(
    "a data file has other problems than when the run began",
    phase="resuming",
    seen="an error with both counts, and `--accept-changes`",
    lost="nothing",
)
def test_other_problems_are_refused(name: str, latest: Path) -> None:
    with pytest.raises(DataError, match=rf"3 problems before, {len(CHANGED[name])} problems now.*--accept-changes"):
        _check_data(run_on(CHANGED[name]), latest, ["train.steps: 4 -> 8"])
    accepting = run_on(CHANGED[name], accepts=True)
    _check_data(accepting, latest, [])
    assert len(accepting.console.warnings) == 1


def test_the_same_problems_and_those_that_the_recipe_asks_for_are_not(latest: Path) -> None:
    _check_data(run_on(PROBLEMS), latest, [])
    _check_data(run_on(PROBLEMS[:1]), latest, ["data.train.0.size: 3 -> 1"])
    (latest / "run_state.json").write_text(json.dumps(STATE))
    _check_data(run_on(PROBLEMS[:1]), latest, [])
