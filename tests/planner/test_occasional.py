"""Evaluations and checkpoints of a plan."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_hdpo.config import Recipe, load_recipe
from megatron_hdpo.costs.cluster import GPUS, Cluster
from megatron_hdpo.costs.parameters import model_values
from megatron_hdpo.planner.from_recipe import Guesses, layout_of, rollouts_of, workload_of
from megatron_hdpo.planner.occasional import evaluation_problems, occasions
from megatron_hdpo.planner.plan import Plan, plan
from megatron_hdpo.planner.shapes import SHAPES

RECIPE = Path(__file__).parents[2] / "examples" / "qwen2.5-7b" / "hdpo.yaml"


def _recipe(*overrides: str) -> Recipe:
    return load_recipe(RECIPE, overrides)


def _plan(recipe: Recipe) -> Plan:
    cluster = Cluster(GPUS["h100"], 2)
    inputs = workload_of(recipe, Guesses()), rollouts_of(recipe, Guesses())
    return plan(SHAPES["qwen2.5-7b"], cluster, layout_of(recipe, cluster.gpus), *inputs)


def _seconds(line: str) -> float:
    return float(re.search(r": (\d+) s once", line)[1])  # type: ignore[index]


def test_an_evaluation_takes_the_time_of_its_samples() -> None:
    """Twice the problems take less than twice the time: each of the two passes waits for its longest response."""
    made = []
    for change in ("limit=2048", "limit=4096"):
        recipe = _recipe(f"data.evaluation.0.{change}")
        line, _ = occasions(_plan(recipe), recipe)
        made.append(line)
    assert made[0].startswith("evaluation of 2,048 problems x 9: ") and "once in 50 steps" in made[0]
    assert _seconds(made[0]) < _seconds(made[1]) < 2 * _seconds(made[0])


def test_tasks_with_few_samples_take_less_time() -> None:
    lines = []
    for few in ("{}", "{few: 1}"):
        tasks = [f"{{kind: digit_sums, name: {name}, lengths: [2], size: 2048}}" for name in ("many", "few")]
        recipe = _recipe(f"data.evaluation=[{', '.join(tasks)}]", f"evaluation.task_samples={few}")
        lines.append(occasions(_plan(recipe), recipe)[0])
    assert lines[0].startswith("evaluation of 4,096 problems x 9: ")
    assert lines[1].startswith("evaluation of 4,096 problems x 5.5: ")
    assert _seconds(lines[1]) < _seconds(lines[0])


def test_a_checkpoint_takes_the_time_of_its_bytes() -> None:
    recipe = _recipe("evaluation.every=null")
    (line,) = occasions(_plan(recipe), recipe)
    assert line.startswith(f"checkpoint of {14 * model_values(SHAPES['qwen2.5-7b']) / 2**30:,.0f} GiB: ")
    following = _recipe("evaluation.every=null", "teacher.kind=ema")
    (longer,) = occasions(_plan(following), following)
    assert _seconds(longer) == pytest.approx(_seconds(line) * 18 / 14, rel=0.05)


def test_a_task_without_a_limit_has_an_unknown_number_of_problems() -> None:
    recipe = _recipe("data.evaluation.0.limit=null")
    assert evaluation_problems(recipe) is None
    assert "not in the recipe" in occasions(_plan(recipe), recipe)[0]
    sums = "{kind: digit_sums, lengths: [2], size: 40}, {kind: digit_sums, name: few, lengths: [2], limit: 10}"
    assert evaluation_problems(_recipe(f"data.evaluation=[{sums}]")) == 50
