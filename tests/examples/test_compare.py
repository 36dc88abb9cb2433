"""A recipe for every method, each of which can be run, and alike but for the method; and the comparison of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hdpo.config import Recipe, check_recipe, load_recipe
from megatron_hdpo.data.load import load
from megatron_hdpo.model.architecture import read_architecture
from megatron_hdpo.model.tiny_model import make_tiny_model
from megatron_hdpo.objectives.registry import OBJECTIVES
from megatron_hdpo.rewards.pool import RewardPool
from megatron_hdpo.training.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
METHODS = sorted((ROOT / "examples" / "methods").glob("*.yaml"))
TEACHER = ROOT / "examples" / "compare" / "teacher.yaml"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("compare") / "model")


def recipe_on(model: Path, path: Path) -> Recipe:
    """The recipe with the tiny model in place of the ones that earlier commands would have made."""
    overrides = [f"model.path={model}"]
    if load_recipe(path).teacher.kind == "external":
        overrides.append(f"teacher.path={model}")
    return load_recipe(path, overrides)


@pytest.mark.parametrize("path", [*METHODS, TEACHER], ids=lambda path: path.stem)
def test_a_recipe_passes_every_check_without_a_warning(path, model):
    assert check_recipe(recipe_on(model, path), read_architecture(model), world_size=1) == []


def test_every_method_of_the_registry_has_a_recipe():
    methods = {config.model_fields["name"].default for config in OBJECTIVES}
    assert {load_recipe(path).objective.name for path in METHODS} == methods


def test_recipes_differ_in_nothing_but_the_method():
    """Model, problems, prompts, warm-up, samples, optimizer and evaluation are those of all."""
    trees = {path.stem: load_recipe(path).model_dump(mode="json") for path in METHODS}
    for name, tree in trees.items():
        assert tree.pop("output") == f"runs/methods/{name}"
        del tree["objective"], tree["teacher"]
        rounds, prompts = tree["rollout"].pop("refill_rounds"), tree["rollout"].pop("prompts_per_step")
        assert (1 + rounds) * prompts == 16, "refilling must not sample more than the others do"
        assert tree == trees[next(iter(trees))]


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_is_and_how_to_run_it(path):
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    prose = head[: head.index("#")]
    assert 3 <= len(prose) <= 5 and "arXiv" in " ".join(prose) and "published settings" in " ".join(prose)
    assert head[-1] == f"#   python -m megatron_hdpo train {path.relative_to(ROOT)}"
    external = load_recipe(path).teacher.kind == "external"
    assert any(str(TEACHER.relative_to(ROOT)) in line for line in head) == external
    if external:
        assert load_recipe(path).teacher.path == f"{load_recipe(TEACHER).output}/hf"


def test_a_sibling_is_shown_where_the_warm_up_showed_the_solution(model):
    """A hint that is a right response makes the very prompt that the warm-up taught the model to use."""
    from megatron_hdpo.data.prompts import Hint

    recipe = recipe_on(model, METHODS[0])
    pool = RewardPool(recipe.data.tasks, recipe.reward)
    try:
        data = load(recipe.data, load_tokenizer(model), pool, True, True)
    finally:
        pool.close()
    for problem in data.train[:8]:
        hinted = data.prompts.hinted(problem, Hint(problem.solution))
        assert hinted.tolist() == data.prompts.privileged_prompt(problem).tolist()


def compare(out: Path, *arguments: str) -> str:
    """What `compare.py` prints, two steps after a warm-up of two."""
    command = [sys.executable, ROOT / "examples" / "compare" / "compare.py", "--out", out, "--seeds", "0"]
    command += ["--steps", "2", "--warmup-steps", "2", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_comparison_ends_with_a_table_and_a_figure_and_goes_on_where_it_stopped(tmp_path):
    compare(tmp_path, "--methods", "grpo,sdpo")
    first = json.loads((tmp_path / "compare.json").read_text())
    rows = {row["method"]: row for row in first["rows"]}
    assert list(rows) == ["warmed up", "grpo", "sdpo"] and not any(row["failed"] for row in rows.values())
    for name in ("grpo", "sdpo"):
        assert rows[name]["summary"]["samples"]["mean"] == 128 and rows[name]["summary"]["step_seconds"]["mean"] > 0
        assert 0 <= rows[name]["summary"]["signal"]["mean"] <= 1
    assert "| sdpo |" in (tmp_path / "compare.md").read_text()
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    written = (tmp_path / "seed0" / "sdpo" / "metrics.jsonl").stat().st_mtime_ns
    (tmp_path / "seed0" / "grpo" / "metrics.jsonl").unlink()
    assert "1 of 2 runs are complete already" in compare(tmp_path, "--methods", "grpo,sdpo")
    assert (tmp_path / "seed0" / "sdpo" / "metrics.jsonl").stat().st_mtime_ns == written
    assert json.loads((tmp_path / "compare.json").read_text())["rows"][1]["runs"]["0"].keys() >= {"hard_pass@8"}


def test_a_failed_run_is_no_number(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "compare")
    from compare_results import LABELS, Outcome, Setting, write_results
    from rich.console import Console

    records = {"step": 2, "rollout/nll": 0.5, "rollout/response_tokens": 9.0, "rollout/samples": 8.0}
    records |= {"compare/signal_rate": 0.25, "time/step_s": 3.0, "time/evaluate_s": 1.0}
    records |= {f"eval/{name}/pass@{k}": 0.125 * k for name in ("n3", "n6", "n7", "n8") for k in (1, 8)}
    for name, damage in (("good", {}), ("diverged", {"rollout/nll": None}), ("short", {"eval/n8/pass@8": None})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(records | damage) + "\n")
    outcomes = {
        ("grpo", 0): Outcome(tmp_path / "good", None),
        ("grpo", 1): Outcome(tmp_path / "good", "killed"),
        ("hdpo", 0): Outcome(tmp_path / "diverged", None),
        ("hdpo", 1): Outcome(tmp_path / "short", None),
        ("opd", 0): Outcome(tmp_path / "nothing", "killed"),
        ("opd", 1): Outcome(tmp_path / "nothing", None),
    }
    write_results(tmp_path, {}, outcomes, Setting([0, 1], 2, 1, 1.0), Console(quiet=True))
    assert (tmp_path / "headline.png").read_bytes().startswith(b"\x89PNG")
    rows = {row["method"]: row for row in json.loads((tmp_path / "compare.json").read_text())["rows"]}
    assert rows["grpo"]["failed"] == 1 and rows["grpo"]["runs"]["1"] == {"failed": "killed"}
    assert rows["grpo"]["summary"]["hard_pass@8"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert rows["grpo"]["summary"]["step_seconds"]["mean"] == 2.0
    assert rows["hdpo"]["summary"] == rows["opd"]["summary"] == {}
    text = (tmp_path / "compare.md").read_text()
    assert f"| hdpo (2 of 2 failed) |{' failed |' * len(LABELS)}" in text and "nan" not in text.lower()


@pytest.mark.parametrize(
    ("steps", "override", "complete"),
    [
        (0, "optimizer.lr=0.1", True),
        (0, "warmup.steps=7", False),
        (0, "data.prompts.max_prompt_tokens=21", False),
        (2, "optimizer.lr=0.1", False),
    ],
)
def test_a_run_is_made_anew_for_the_settings_that_it_depends_on(steps, override, complete, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "compare")
    from compare_jobs import RECIPES, Job

    from megatron_hdpo.config import save_recipe

    job = Job(RECIPES / "grpo.yaml", tmp_path / "run", (f"train.steps={steps}",))
    assert not job.is_complete()
    save_recipe(job.load(), job.folder / "recipe.yaml")
    (job.folder / "hf").mkdir()
    (job.folder / "hf" / "config.json").write_text("{}")
    assert not job.is_complete()
    (job.folder / "metrics.jsonl").write_text(json.dumps({"step": steps}) + "\n")
    assert job.is_complete()
    assert Job(job.recipe, job.folder, (*job.overrides, override)).is_complete() == complete
