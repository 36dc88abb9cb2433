"""Ranks that stand still in a phase of a real run: the others name them, in one line, and the run ends."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from commands import run_world
from recipes import Tree, small_recipe
from stalls import LATE, train_with_stall
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

DEADLINE_S = 6.0
PHASES = (
    "join ranks",
    "build",
    "health checks",
    "load data",
    "load model",
    "start engine",
    "prepare",
    "sync",
    "self-test",
    "rollout",
    "train",
    "optimizer",
    "save",
    "evaluate",
    "export",
)


def recipe_of(model: Path, output: Path, phase: str) -> Tree:
    tree = small_recipe(model, output)
    tree["train"]["steps"] = 1
    minutes = DEADLINE_S / 60
    tree["parallel"] = {
        "timeout_minutes": minutes,
        "phase_minutes": {"train" if phase == "optimizer" else phase: minutes},
    }
    return tree


def stalled(model: Path, folder: Path, phase: str, kind: str, ranks: int) -> str:
    """The only line that the ranks of a run print on stderr; the living ones must end with exit code 2."""
    recipe, errors = folder / "recipe.yaml", folder / "error"
    recipe.write_text(yaml.safe_dump(recipe_of(model, folder / "run", phase)))
    environment = {"TORCHELASTIC_ERROR_FILE": str(errors)}
    ended = run_world(
        ranks, train_with_stall, str(recipe), phase, kind, DEADLINE_S, environment=environment, timeout=150
    )
    assert [code for rank, code in enumerate(ended.codes) if rank != LATE] == [2] * (ranks - 1), ended.text
    (line,) = "".join(ended.stderr).splitlines()
    box = ChildFailedError("train", {0: ProcessFailure(0, 1, 2, f"{errors}0")}).format_msg()
    assert line.removeprefix("RankError: ").rpartition("ranks waited for")[2] in box, (line, box)
    return line


def check_line(line: str, phase: str, kind: str) -> None:
    if phase == "join ranks" and kind != "kill":
        assert line.startswith("RankError: 1 of ") and f"(parallel.timeout_minutes): {LATE};" in line, line
        return
    why = {"spin": "made no progress for ", "stop": "given no sign of life for ", "kill": "ended; "}[kind]
    assert line.startswith("RankError: ") and re.search(rf"rank {LATE} on \S+ has {why}", line), line
    assert f"logs/rank_0000{LATE}.log" in line and "rank 0 on" not in line.partition(why)[0], line
    if kind != "kill":  # the error of a broken connection may have ended the phase of the others meanwhile
        assert ("train" if phase == "optimizer" else phase) in line.partition(why)[2], line


@pytest.mark.fault(
    "a rank stands still amid a step, and the others wait in a collective",
    phase="learning",
    seen="after the deadline one line: rank, host, step, phase, line of code; also in torchrun's summary; exit code 2",
    lost="the steps since the last checkpoint",
)
def test_a_rank_that_stands_still_while_others_train_is_named(tiny_model: Path, tmp_path: Path) -> None:
    line = stalled(tiny_model, tmp_path, "train", "spin", 2)
    check_line(line, "train", "spin")
    assert "the last that it said: step 1, train" in line and "stalls.py" not in line


@pytest.mark.long
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", ["spin", "stop", "kill"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_rank_that_is_late_in_any_phase_is_named(
    phase: str, kind: str, ranks: int, tiny_model: Path, tmp_path: Path
) -> None:
    check_line(stalled(tiny_model, tmp_path, phase, kind, ranks), phase, kind)
