"""Long runs with a fault every few steps end with the numbers of a run without any, and hold nothing more."""

from __future__ import annotations

import json
import time
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from commands import results_of, run_world
from recipes import Tree, small_recipe
from soak import STRUCK, USAGE, Fault, after, live, plan, struck
from test_run import contents_of, metrics_of, rollouts_of

MIB = 1 << 20
EVERY = 4
"""Steps between checkpoints."""


def recipe_of(model: Path, output: Path, steps: int) -> Tree:
    """HDPO with a teacher that must be restored, and saved rollouts of the last steps."""
    tree = small_recipe(model, output)
    tree["teacher"] = {"kind": "ema", "decay": 0.9}
    tree["optimizer"] = {"lr": 2e-3, "schedule": "cosine", "warmup_steps": 3}
    tree["train"]["steps"] = steps
    tree["checkpoint"] = {"every": EVERY, "keep": 2}
    tree["evaluation"] = {"before": False, "every": 10, "samples": 2, "k": [1]}
    tree["tracking"], tree["self_test"] = {"tensorboard": False}, {"enabled": False}
    return tree


def train_whole(tree: Tree, ranks: int) -> None:
    """Train without a fault."""
    path = Path(tree["output"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(tree))
    results_of(run_world(ranks, live, str(path), [], str(path.parent), timeout=1200))


def train_with(tree: Tree, faults: list[Fault], ranks: int, notes: Path) -> int:
    """Start the run again until it is whole; return the number of its lives."""
    output = Path(tree["output"])
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(tree))
    for number in range(1, len(faults) + 2):
        known = len(struck(faults, notes))
        ended = run_world(ranks, live, str(path), faults, str(notes), timeout=1200)
        new = struck(faults, notes)[known:]
        for fault in new:
            after(fault, output)
        if not any(ended.codes) and "ended as asked" not in ended.stdout[0]:
            return number
        assert new, f"ended without a fault: {ended.codes}\n{ended.text}"
    raise AssertionError("more lives than faults")


def usage_of(notes: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (notes / USAGE).read_text().splitlines()]


def check_nothing_piles_up(notes: Path) -> None:
    """Within each life memory, descriptors, threads and children stay; after it no process of it is left."""
    lines = sorted(usage_of(notes), key=lambda line: (line["rank"], line["pid"], line["step"]))
    deadline = time.monotonic() + 30
    pids = {pid for line in lines for pid in (line["pid"], *line["children"])}
    while left := [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.1)
    for life, steps in groupby(lines, key=lambda line: (line["rank"], line["pid"])):
        of_life = list(steps)[EVERY + 1 :]  # the first checkpoint starts what stays
        if len(of_life) < 2:
            continue
        first, last = of_life[0], of_life[-1]
        assert last["bytes"] - first["bytes"] < 32 * MIB, (life, first, last)
        for kind in ("descriptors", "threads"):
            assert last[kind] <= first[kind] + 2, (life, kind, first, last)
        assert len(last["children"]) <= len(first["children"]), (life, first, last)


def bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def soak(model: Path, folder: Path, steps: int, faults: list[Fault], ranks: int) -> int:
    """Train with and without faults, and compare all that they leave; return the number of lives."""
    whole = recipe_of(model, folder / "whole" / "run", steps)
    tree = recipe_of(model, folder / "soaked" / "run", steps)
    for one in (whole, tree):
        Path(one["output"]).parent.mkdir()
    train_whole(whole, ranks)
    lives = train_with(tree, faults, ranks, folder / "soaked")
    assert struck(faults, folder / "soaked") == faults, (folder / "soaked" / STRUCK).read_text()
    # A run that was asked to end after it had learned sends that step's weights at its next start.
    assert _without_sync(metrics_of(tree)) == _without_sync(metrics_of(whole))
    kept = [path.name for path in sorted((Path(whole["output"]) / "rollouts").iterdir())]
    assert [path.name for path in sorted((Path(tree["output"]) / "rollouts").iterdir())] == kept
    for step in range(1, steps + 1):
        assert contents_of(rollouts_of(tree, step)) == contents_of(rollouts_of(whole, step))
    weights = [(Path(one["output"]) / "hf/model.safetensors").read_bytes() for one in (whole, tree)]
    assert weights[0] == weights[1]
    check_nothing_piles_up(folder / "soaked")
    left = {path.name for path in (Path(tree["output"]) / "checkpoints").iterdir()}
    assert not any("partial" in name for name in left), left
    return lives


def _without_sync(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if not name.startswith("sync/")} for line in lines]


@pytest.mark.long
@pytest.mark.fault(
    "six faults in thirty steps: kills, signals, dead checking processes, a full disk, damage to files",
    phase="all",
    seen="each fault's own line",
    lost="nothing: the same numbers; memory, descriptors, processes and disk stay",
)
def test_thirty_steps_with_six_faults(tiny_model: Path, tmp_path: Path) -> None:
    lives = soak(tiny_model, tmp_path, 30, plan(1, 30, 6, ranks=1), ranks=1)
    assert lives > 1


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_two_hundred_steps_with_twenty_five_faults(tiny_model: Path, tmp_path: Path) -> None:
    soak(tiny_model, tmp_path, 200, plan(2, 200, 25, ranks=2), ranks=2)
