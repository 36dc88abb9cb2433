"""Whole runs with SGLang in place of the embedded engine: what they leave behind, resumed, ahead, and interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from commands import Ended, run_command
from recipes import Tree, small_recipe
from server_tools import LiveServer

from megatron_hdpo.rollout.sample_log import read_groups
from megatron_hdpo.rollout.types import Group
from megatron_hdpo.tracking.metrics import read_metrics

STEPS = 3


def recipe_on(urls: list[str], model: Path, output: Path) -> Tree:
    """HDPO after a warm-up that lets some rollouts be right, on servers that are there."""
    tree = small_recipe(model, output)
    tree["data"]["train"][0]["lengths"] = [2, 2, 4]
    tree["warmup"] = {
        "kind": "sft",
        "steps": 40,
        "examples_per_step": 32,
        "optimizer": {"lr": 1e-2},
        "plain": [{"kind": "digit_sums", "name": "short", "lengths": [2], "size": 40, "seed": 3}],
        "privileged": [{"kind": "digit_sums", "name": "shown", "lengths": [2, 3, 4], "size": 200, "seed": 4}],
    }
    tree["rollout"] |= {
        "engine": "sglang",
        "samples_per_prompt": 8,
        # The self-test's flattened weights look untrained to a model of 17 tokens.
        "sglang": {"placement": "given", "urls": urls, "servers": {"dtype": "float32"}, "sync": {"min_peak": 0}},
    }
    tree["train"]["steps"] = STEPS
    tree["checkpoint"] = {"every": 1, "keep": 2, "export": False}
    tree["tracking"] = {"tensorboard": False}
    return tree


def train(tree: Tree, *overrides: str, ranks: int = 1, **kw: Any) -> Ended:
    """The command on a recipe file beside its output; every rank ends well."""
    ended = run(tree, *overrides, ranks=ranks, **kw)
    assert ended.codes == [0] * ranks, f"exit codes {ended.codes}\n{ended.text}"
    return ended


def run(tree: Tree, *overrides: str, ranks: int = 1, timeout: float = 120, **kw: Any) -> Ended:
    """The command, however it ends."""
    file = Path(tree["output"]).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    return run_command("train", file, *overrides, ranks=ranks, timeout=timeout, **kw)


def groups_of(folder: Path, step: int) -> list[Group]:
    return read_groups(folder / "rollouts" / f"step_{step:08d}.jsonl")


def versions_of(groups: list[Group]) -> set[int]:
    return {
        int(version)
        for group in groups
        for sample in (*group.samples, *group.privileged)
        for version in sample.completion.weight_versions
    }


def rows_of(folder: Path) -> list[dict[str, float]]:
    """Metrics of steps 1, 2, ..."""
    return [row for row in read_metrics(folder / "metrics.jsonl") if row["step"] > 0]


@pytest.mark.parametrize("layout", [{}, {"tensor": 2, "pipeline": 2}], ids=["alone", "TP2xPP2"])
def test_a_run_on_servers_trains_and_goes_on_where_it_stopped(
    sglang_server: LiveServer, tmp_path: Path, layout: dict[str, int]
) -> None:
    tree = recipe_on([sglang_server.url], sglang_server.model, tmp_path / "run")
    tree["parallel"] = layout
    ranks = int(np.prod([*layout.values(), 1]))
    train(tree, "train.steps=2", ranks=ranks)
    resumed = train(tree, ranks=ranks)
    assert "resumed from step_00000002" in resumed.stdout[0]
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["sync/bytes"] > 50_000 and row["sync/gb_per_s"] > 0 and row["sync/transfer_s"] > 0
        assert row["rollout/mixed_versions_rate"] == 0 and row["rollout/samples"] == 32
        assert row["rollout/generation_failed"] == 0
    trained = [row for row in rows if "train/mismatch_k3" in row]
    assert trained, "the warm-up makes some groups mixed"
    for row in trained:
        assert abs(row["train/mismatch_k3"]) < 1e-6 and row["train/mismatch_max"] < 1.01 and row["train/grad_norm"] > 0
    for step in (1, 2, 3):
        groups = groups_of(tmp_path / "run", step)
        assert versions_of(groups) == {step - 1} and len(groups) == 4
        assert all(len(group.samples) == 8 for group in groups)


@pytest.mark.parametrize("swap", ["after_batch", "mid_generation"])
def test_rollouts_ahead_are_one_step_old_at_most(sglang_server: LiveServer, tmp_path: Path, swap: str) -> None:
    tree = recipe_on([sglang_server.url], sglang_server.model, tmp_path / "run")
    tree["rollout"] |= {"ahead": 1, "swap": swap, "max_new_tokens": 64}
    tree["train"]["steps"] = 4
    train(tree, "optimizer.lr=3e-2")
    rows = rows_of(tmp_path / "run")
    assert versions_of(groups_of(tmp_path / "run", 1)) == {0}
    for step in (2, 3, 4):
        versions = versions_of(groups_of(tmp_path / "run", step))
        assert versions <= {step - 2, step - 1} and step - 2 in versions, (step, versions)
        if swap == "after_batch":
            assert versions == {step - 2}
            assert rows[step - 1]["rollout/mixed_versions_rate"] == 0
    pairs = zip(rows[1:], rows, strict=False)
    moved = [row for row, before in pairs if "train/mismatch_k3" in row and before["train/grad_norm"] > 0]
    assert moved and all(row["train/mismatch_k3"] > 1e-6 for row in moved), "old rollouts are not the new policy's"
