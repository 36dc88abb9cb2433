"""`dtype: auto`: what it becomes, on every rank and after a resume, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import results_of, run_world
from distributed_helper import run_ranks
from recipes import Tree

from megatron_hdpo import cli
from megatron_hdpo.checkpoint.store import CheckpointError
from megatron_hdpo.config import check_recipe, load_recipe, parse_recipe
from megatron_hdpo.config.precision import begun_in, choose_precision, resolve
from megatron_hdpo.health import doctor
from megatron_hdpo.model import dtype_speed
from megatron_hdpo.model.architecture import Architecture, read_architecture
from megatron_hdpo.model.dtype_speed import Bfloat16Speed
from megatron_hdpo.training.run import build_run, settle_precision

SLOW, FAST = Bfloat16Speed(23.0), Bfloat16Speed(0.5)


class Measured:
    """A measurement with a given result; counts how often it is asked, and for which sizes."""

    def __init__(self, speed: Bfloat16Speed) -> None:
        self.speed, self.sizes = speed, []

    def __call__(self, hidden: int, channels: int) -> Bfloat16Speed:
        self.sizes.append((hidden, channels))
        return self.speed


@pytest.fixture
def auto(tree: Tree) -> Tree:
    """A recipe that names no precision."""
    del tree["model"]["dtype"], tree["rollout"]["embedded"]
    return tree


@pytest.fixture
def architecture(tiny_model: Path) -> Architecture:
    return read_architecture(tiny_model)


# ---- the choice


@pytest.mark.parametrize(
    ("speed", "line"),
    [
        (SLOW, "precision: float32 (bfloat16 is 23 times slower than float32 on this CPU)"),
        (FAST, "precision: bfloat16 (bfloat16 is 2.00 times faster than float32 on this CPU)"),
    ],
)
def test_auto_takes_what_is_faster(speed: Bfloat16Speed, line: str, auto: Tree, architecture: Architecture) -> None:
    measure = Measured(speed)
    choice = choose_precision(parse_recipe(auto), architecture, "cpu", measure=measure)
    assert choice.line == line and choice.warning is None
    assert choice.dtype == line.split()[1]
    assert measure.sizes == [(architecture.hidden_size, architecture.ffn_size)]


def test_auto_is_bfloat16_on_gpus(auto: Tree, architecture: Architecture) -> None:
    measure = Measured(SLOW)
    choice = choose_precision(parse_recipe(auto), architecture, "cuda", measure=measure)
    assert (choice.dtype, choice.line, choice.warning) == ("bfloat16", "precision: bfloat16 (on a GPU)", None)
    assert measure.sizes == []


def test_engines_follow_the_model(auto: Tree) -> None:
    for dtype in ("float32", "bfloat16"):
        recipe = resolve(parse_recipe(auto), dtype)
        servers = recipe.rollout.sglang.servers
        assert (recipe.model.dtype, recipe.rollout.embedded.dtype, servers.dtype) == (dtype,) * 3
    explicit = parse_recipe(auto | {"rollout": auto["rollout"] | {"embedded": {"dtype": "float16"}}})
    assert resolve(explicit, "bfloat16").rollout.embedded.dtype == "float16"


@pytest.mark.parametrize(
    ("section", "key"), [({"model": {"fp8": "hybrid"}}, "model.fp8"), ({"optimizer": {"offload": 1.0}}, "optimizer.")]
)
def test_what_needs_bfloat16_gets_it(section: Tree, key: str, auto: Tree, architecture: Architecture) -> None:
    name, value = next(iter(section.items()))
    recipe = parse_recipe(auto | {name: auto.get(name, {}) | value})
    choice = choose_precision(recipe, architecture, "cpu", measure=Measured(SLOW))
    assert choice.dtype == "bfloat16" and choice.line.startswith(f"precision: bfloat16 ({key}")
    assert choice.warning is not None and "23 times slower" in choice.warning


def test_float32_that_is_asked_for_is_not_measured(tree: Tree, architecture: Architecture) -> None:
    measure = Measured(FAST)
    choice = choose_precision(parse_recipe(tree), architecture, "cpu", measure=measure)
    assert choice.line == "precision: float32 (model.dtype=float32)"
    assert measure.sizes == [] and choice.warning is None


def test_slow_bfloat16_that_is_asked_for_is_warned_of(tree: Tree, architecture: Architecture) -> None:
    tree["model"]["dtype"] = tree["rollout"]["embedded"]["dtype"] = "bfloat16"
    choice = choose_precision(parse_recipe(tree), architecture, "cpu", measure=Measured(SLOW))
    assert choice.dtype == "bfloat16"
    assert choice.warning == (
        "model.dtype=bfloat16 and rollout.embedded.dtype=bfloat16: bfloat16 is 23 times slower than float32 on this "
        "CPU; dtype=auto would take float32"
    )
    assert choose_precision(parse_recipe(tree), architecture, "cpu", measure=Measured(FAST)).warning is None
    assert choose_precision(parse_recipe(tree), architecture, "cuda", measure=Measured(SLOW)).warning is None


def test_an_engine_of_its_own_precision_is_told(auto: Tree, architecture: Architecture) -> None:
    auto["rollout"]["embedded"] = {"dtype": "bfloat16"}
    measure = Measured(SLOW)
    choice = choose_precision(parse_recipe(auto), architecture, "cpu", measure=measure)
    assert choice.dtype == "float32" and choice.line.endswith(", engine: bfloat16 (rollout.embedded.dtype)")
    assert choice.warning is not None and choice.warning.startswith("rollout.embedded.dtype=bfloat16: bfloat16 is 23")
    assert len(measure.sizes) == 1


def test_servers_that_follow_the_model_do_not_differ_from_it(auto: Tree, architecture: Architecture) -> None:
    auto["rollout"] |= {"engine": "sglang"}
    recipe = resolve(parse_recipe(auto), "float32")
    assert not [line for line in check_recipe(recipe, architecture, 1) if "servers.dtype" in line]


# ---- a resume


def begun(folder: Path, dtype: str | None, checkpoint: bool) -> None:
    """What a run leaves: recipe.yaml with bfloat16, and a checkpoint whose run state says `dtype`."""
    (folder / "checkpoints" / "warmed_up").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"model": {"dtype": "bfloat16"}}))
    if checkpoint:
        path = folder / "checkpoints" / "step_00000001"
        path.mkdir()
        state = {"step": 1, "tensor_parallel": 1, "pipeline_parallel": 1, "architecture": {}} | {"dtype": dtype}
        (path / "run_state.json").write_text(json.dumps(state))


def test_the_run_state_tells_what_a_run_began_in(tmp_path: Path) -> None:
    assert begun_in(tmp_path) is None
    begun(tmp_path / "whole", "float32", checkpoint=True)
    assert begun_in(tmp_path / "whole") == "float32"
    begun(tmp_path / "older", None, checkpoint=True)
    begun(tmp_path / "in warm-up", None, checkpoint=False)
    assert begun_in(tmp_path / "older") == begun_in(tmp_path / "in warm-up") == "bfloat16"


def test_a_recipe_alone_is_no_run(tmp_path: Path) -> None:
    """Nothing was kept that another precision would lose."""
    (tmp_path / "recipe.yaml").write_text("the recipe of the run\n")
    assert begun_in(tmp_path) is None


def test_a_run_in_slow_bfloat16_says_how_to_leave_it(auto: Tree, architecture: Architecture) -> None:
    choice = choose_precision(parse_recipe(auto), architecture, "cpu", "bfloat16", Measured(SLOW))
    assert choice.line == "precision: bfloat16 (this run began in it)"
    assert choice.warning is not None
    assert "23 times slower" in choice.warning and "in another output folder" in choice.warning


def train_twice(path: str, first: Bfloat16Speed, then: Bfloat16Speed, explicit: str) -> dict[str, Any]:
    """A step on a machine where bfloat16 is `first`, a resume where it is `then`, and one in the other precision."""
    from megatron_hdpo.parallel.context import start, stop
    from megatron_hdpo.training.loop import train

    found: dict[str, Any] = {"types": [], "saved": [], "states": []}
    for step, speed in enumerate((first, then), 1):
        recipe = load_recipe(path, [f"train.steps={step}"])
        run = build_run(recipe, start(recipe.parallel, "cpu"), resumes=True, measure=Measured(speed))
        train(run)
        run.close(False)
        engine = next(iter(run.engine._model._model.parameters())).dtype
        found["types"].append([str(next(run.policy.model.parameters()).dtype), str(engine)])
        saved = yaml.safe_load((recipe.output / "recipe.yaml").read_text())
        found["saved"].append([saved["model"]["dtype"], saved["rollout"]["embedded"]["dtype"]])
        found["states"].append(begun_in(recipe.output))
        stop()
    recipe = load_recipe(path, ["train.steps=3", f"model.dtype={explicit}"])
    try:
        build_run(recipe, start(recipe.parallel, "cpu"), resumes=True, measure=Measured(FAST))
    except CheckpointError as error:
        found["refused"] = str(error)
    return found


@pytest.mark.parametrize(("first", "then", "kept"), [(SLOW, FAST, "float32"), (FAST, SLOW, "bfloat16")])
def test_a_resume_keeps_the_precision(
    first: Bfloat16Speed, then: Bfloat16Speed, kept: str, auto: Tree, write_recipe: Callable[[Tree], Path]
) -> None:
    other = {"float32": "bfloat16", "bfloat16": "float32"}[kept]
    auto |= {"checkpoint": {"every": 1, "export": False}, "self_test": {"enabled": False}, "evaluation": {"samples": 1}}
    auto["evaluation"]["k"] = [1]
    auto["tracking"] = {"tensorboard": False}
    ended = run_world(1, train_twice, str(write_recipe(auto)), first, then, other)
    (found,) = results_of(ended)
    assert found["types"] == [[f"torch.{kept}"] * 2] * 2
    assert found["saved"] == [[kept, kept]] * 2 and found["states"] == [kept] * 2
    said = ended.stdout[0]
    assert said.count(f"precision: {kept} ({first})\n") == 1
    assert said.count(f"precision: {kept} (this run began in it)\n") == 1
    assert said.count("times slower than float32 on this CPU;") == (1 if kept == "bfloat16" else 0)
    assert "the recipe has changed since this run was last started: train.steps: 1 -> 2\n" in said
    assert f"was written with model.dtype={kept}, this run has {other}" in found["refused"]
    assert f"Set model.dtype to auto or {kept}" in found["refused"]


# ---- several ranks


def settled(path: str, dtype: str) -> tuple[str, str, int, str]:
    """On a rank whose CPU is fast at bfloat16 if its number is odd: its precisions, its measurements, its console."""
    import io

    from megatron_hdpo.parallel.context import start
    from megatron_hdpo.tracking.console import Console

    recipe = load_recipe(path, [f"model.dtype={dtype}"])
    context = start(recipe.parallel, "cpu")
    measure, stream = Measured(FAST if context.rank % 2 else SLOW), io.StringIO()
    console = Console(context.is_leader, stream=stream)
    recipe = settle_precision(recipe, read_architecture(recipe.model.path), context, console, measure)
    return recipe.model.dtype, recipe.rollout.embedded.dtype, len(measure.sizes), stream.getvalue()


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("dtype", "becomes"), [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_rank_0_decides(ranks: int, dtype: str, becomes: str, auto: Tree, write_recipe: Callable[[Tree], Path]) -> None:
    results = run_ranks(ranks, settled, str(write_recipe(auto)), dtype)
    assert [result[:2] for result in results] == [(becomes, becomes)] * ranks
    assert [result[2] for result in results] == [1] + [0] * (ranks - 1)
    assert [result[3].count("precision: ") for result in results] == [1] + [0] * (ranks - 1)
    warnings = [result[3].count("warning: model.dtype=bfloat16: bfloat16 is 23 times slower") for result in results]
    assert warnings == [1 if dtype == "bfloat16" else 0] + [0] * (ranks - 1)


# ---- commands


@pytest.fixture
def slow_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtype_speed, "compare", lambda *products: SLOW)


def test_check_says_it(
    slow_here: None, auto: Tree, write_recipe: Callable[[Tree], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_recipe(auto))
    cli.main(["check", path])
    said = capsys.readouterr().out
    assert said.startswith("precision: float32 (bfloat16 is 23 times slower than float32 on this CPU)\n")
    assert "warning" not in said
    cli.main(["check", path, "model.dtype=bfloat16"])
    said = capsys.readouterr().out
    assert said.startswith("precision: bfloat16 (model.dtype=bfloat16)\n")
    assert "\nwarning: model.dtype=bfloat16: bfloat16 is 23 " in said
    assert said.count("warning: ") == 1


def test_the_doctor_says_it(slow_here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert list(doctor._precision()) == [
        (
            "bfloat16 is 23 times slower than float32 on this CPU (a layer of 576 x 1536, for which dtype=auto takes "
            "float32; `check` measures a recipe's own)",
            True,
        )
    ]
    assert any("dtype=auto takes" in said for said, _ in doctor.findings())
