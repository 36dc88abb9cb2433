"""A checkpoint of the installed Megatron-Core goes on under the newest one: an upgrade in the middle of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import megatron.core
import pytest
from distributed_helper import run_ranks
from layout_cases import digest
from saved_elsewhere import FORMATS, MODEL, OPTIMIZER, steps
from tiny_policy import build_policy, joined, weights_of

from megatron_hdpo.checkpoint.store import CheckpointStore

CORE = Path(megatron.core.__file__).parents[2]
HELPERS = Path(__file__).parents[1] / "helpers"


@pytest.fixture(scope="module")
def went_on(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Checkpoints that another Megatron-Core wrote, and how it went on."""
    others = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry and Path(entry) != CORE]
    if str(CORE) not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        pytest.skip("there is one Megatron-Core here; `python tools/run_tests.py newest-core` has two")
    folder = tmp_path_factory.mktemp("versions")
    path = os.pathsep.join([*others, str(HELPERS.parents[1]), str(HELPERS)])
    command = [sys.executable, HELPERS / "saved_elsewhere.py", folder]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=True, timeout=240)
    there = json.loads((folder / "went_on.json").read_text())
    assert there["megatron_core"] != megatron.core.__version__
    return folder, there["formats"]


def _resumed(folder: Path) -> dict[str, Any]:
    seen = {}
    with joined() as context:
        for name, reshardable in FORMATS.items():
            policy = build_policy(folder / MODEL, context, optimizer=OPTIMIZER, total_steps=6, dtype="bfloat16")
            store = CheckpointStore(folder / name, context, keep=1, reshardable=reshardable)
            store.load(store.latest(), policy)
            seen[name] = {"saved": digest(weights_of(policy)), "metrics": steps(policy, range(2, 5))}
    return seen


def test_a_run_goes_on_under_a_newer_megatron(went_on: tuple[Path, dict[str, Any]]) -> None:
    folder, before = went_on
    (after,) = run_ranks(1, _resumed, folder, timeout=240.0)
    for name in FORMATS:
        assert after[name]["saved"] == before[name]["saved"]
        for mine, theirs in zip(after[name]["metrics"], before[name]["metrics"], strict=True):
            for key in ("train/surrogate_loss", "distill/divergence", "train/grad_norm", "train/lr"):
                assert mine[key] == pytest.approx(theirs[key], rel=1e-3), (name, key)
