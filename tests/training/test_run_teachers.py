"""Whole runs with teachers that have a memory or a model of their own, stopped and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from commands import results_of, run_command
from recipes import Tree, make_model, small_recipe

from megatron_hdpo.tracking.metrics import read_metrics


def ended_run(tree: Tree, *overrides: str, ranks: int = 1) -> str:
    """Train; the console's text of the leader."""
    path = Path(tree["output"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(tree))
    ended = run_command("train", str(path), *overrides, ranks=ranks, timeout=150)
    results_of(ended)
    return ended.stdout[0]


def recipe_of(model: Path, output: Path) -> Tree:
    tree = small_recipe(model, output)
    tree["train"] |= {"steps": 3, "updates_per_step": 2}
    tree["checkpoint"] = {"every": 1, "keep": 3}
    tree["tracking"] = {"tensorboard": False}
    tree["evaluation"]["every"] = 100
    tree["self_test"] = {"enabled": False}
    return tree


def numbers_of(tree: Tree) -> list[dict[str, float]]:
    lines = read_metrics(tree["output"])
    return [{name: v for name, v in line.items() if not name.startswith("time")} for line in lines]


def test_a_resumed_average_and_reference(tiny_model: Path, tmp_path: Path) -> None:
    """HDPO with an EMA teacher and a KL penalty: two runs of one and of two pieces end in the same bits."""
    trees = [recipe_of(tiny_model, tmp_path / name) for name in ("whole", "pieces")]
    for tree in trees:
        tree["teacher"] = {"kind": "ema", "decay": 0.5, "clock": "optimizer_step"}
        tree["objective"]["kl"] = {"coefficient": 0.2}
    ended_run(trees[0])
    ended_run(trees[1], "train.steps=1")
    assert "resumed from step_00000001" in ended_run(trees[1])
    weights = [(tmp_path / name / "hf/model.safetensors").read_bytes() for name in ("whole", "pieces")]
    assert weights[0] == weights[1]
    whole, pieces = (numbers_of(tree) for tree in trees)
    kept = [line["train/grad_norm"] for line in whole if "train/grad_norm" in line]
    assert kept == [line["train/grad_norm"] for line in pieces if "train/grad_norm" in line] and len(kept) == 3
    # At the start policy and reference are one model; two updates per step later they are not.
    penalties = [line["train/reference_kl"] for line in whole if "train/reference_kl" in line]
    assert len(penalties) == 3 and abs(penalties[0]) < abs(penalties[-1])
    state = json.loads((tmp_path / "pieces/checkpoints/step_00000003/run_state.json").read_text())
    assert state["memory"]["teacher"] == {"kind": "ema", "values": {"ticks": 6}, "weights": True}
    assert (tmp_path / "pieces/checkpoints/teacher").is_dir()


@pytest.mark.parametrize("objective", [{"name": "opd", "estimator": "full"}, {"name": "vopd"}], ids=["opd", "vopd"])
def test_another_checkpoint_teaches(objective: Tree, tiny_model: Path, tmp_path: Path) -> None:
    """The divergence to a larger model falls, on two ranks, where the two models' vocabularies are sharded."""
    larger = make_model(tmp_path / "larger", hidden=48, seed=5)
    tree = recipe_of(tiny_model, tmp_path / "run")
    tree["objective"], tree["teacher"] = objective, {"kind": "external", "path": str(larger)}
    tree["parallel"] = {"tensor": 2}
    tree["optimizer"]["lr"] = 5e-3
    tree["train"] |= {"steps": 4}
    ended_run(tree, ranks=2)
    lines = [line for line in numbers_of(tree) if "train/grad_norm" in line]
    name = "distill/divergence" if objective["name"] == "opd" else "distill/sampled_kl"
    assert len(lines) == 4 and lines[-1][name] < 0.7 * lines[0][name]
    if objective["name"] == "vopd":
        assert all(line["vopd/second_moment"] > 0 and line["vopd/second_moment_without_baseline"] > 0 for line in lines)


def test_another_tokenizer_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", characters="ZYXWVUTSRQP0123456789+=")
    tree = recipe_of(tiny_model, tmp_path / "run")
    tree["objective"], tree["teacher"] = {"name": "opd"}, {"kind": "external", "path": str(other)}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    ended = run_command("train", str(path), timeout=100)
    assert ended.codes == [2] and "teacher.path: the tokenizer of" in ended.text and "is not the model's" in ended.text
