"""`evaluate`: the table, the two files, and a run's folder that stays as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import results_of, run_command
from recipes import Tree


def test_evaluate_writes_two_files_and_leaves_the_run_alone(tree: Tree, write_recipe: Callable[[Tree], Path]) -> None:
    """The model is the export of the same run, which `train` would refuse: it would overwrite it."""
    output = Path(tree["output"])
    shutil.copytree(tree["model"]["path"], output / "hf")
    (output / "metrics.jsonl").write_text('{"step": 0, "time": 1.0}\n{"step": 1, "time": 2.0}\n')
    (output / "recipe.yaml").write_text("the recipe of the run\n")
    recipe = write_recipe(tree)
    exported = f"model.path={output / 'hf'}"
    ended = run_command("evaluate", recipe, "seed=5", exported)
    results_of(ended)
    (header,) = [line for line in ended.stdout[0].splitlines() if "pass@1" in line]
    assert [word for word in ("set", "problems", "samples", "pass@1", "pass@2", "greedy") if word not in header] == []
    (row,) = [line for line in ended.stdout[0].splitlines() if line.startswith("held_out ")]
    evaluation = json.loads((output / "evaluation.json").read_text())
    metrics = evaluation["metrics"]
    low, high = metrics["eval/held_out/pass@1_low"], metrics["eval/held_out/pass@1_high"]
    assert f" {metrics['eval/held_out/pass@1']:.3f} ({low:.3f} to {high:.3f})" in row
    assert (evaluation["seed"], evaluation["model"]) == (5, str(output / "hf"))

    lines = [json.loads(line) for line in (output / "evaluation_samples.jsonl").read_text().splitlines()]
    assert len(lines) == metrics["eval/held_out/problems"] == 4
    rewards = [sample["reward"] for line in lines for sample in line["samples"]]
    assert len(rewards) == metrics["eval/held_out/samples"] == 8
    assert sum(rewards) / 8 == pytest.approx(metrics["eval/held_out/reward_mean"])
    assert all(len(line["greedy"]) == 1 and line["question"].endswith("=") for line in lines)

    assert (output / "metrics.jsonl").read_text().count("\n") == 2
    assert (output / "recipe.yaml").read_text() == "the recipe of the run\n"
    written = {"evaluation.json", "evaluation_samples.jsonl"}
    assert {path.name for path in output.iterdir()} == {"metrics.jsonl", "recipe.yaml", "logs", "hf"} | written

    refused = run_command("train", recipe, exported)
    assert refused.codes == [2] and "is where this run exports to" in refused.stderr[0]


def test_evaluate_without_problems_says_so(tree: Tree, write_recipe: Callable[[Tree], Path]) -> None:
    ended = run_command("evaluate", write_recipe(tree), "data.evaluation=[]")
    assert ended.codes == [2]
    assert ended.stderr == ["RecipeError: data.evaluation: there is no problem to evaluate on: name a task\n"]
