"""The command `explain`, and the files that are generated from the same schema."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from recipes import ROOT

from megatron_hdpo import cli
from megatron_hdpo.config import RecipeError
from megatron_hdpo.config.explain import all_keys, explain, json_schema, markdown

RECIPES = sorted((ROOT / "examples").rglob("*.yaml"))


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("rollout.temperature", ["type: number, > 0", "default: 1.0", "Sampling temperature"]),
        ("optimizer.betas", ["type: list of 2: number, >= 0, < 1", "default: [0.9, 0.999]"]),
        ("rollout.swap", ["one of after_batch, mid_generation", "default: after_batch"]),
        ("rollout.top_k", ["type: integer or null, >= 1", "default: null"]),
        ("output", ["type: path", "default: none: the key is required"]),
        ("warmup.optimizer.lr", ["default: 1e-05"]),
        ("optimizer.lr", ["default: 1e-06"]),
        ("teacher.ema.decay", ["teacher.decay", "default: 0.95"]),
        ("data.train.0.size", ["data.train[].size"]),
        ("tracking.wandb.project", ["the key is required"]),
        ("optimizer", ["optimizer.lr: number, > 0 (default: 1e-06)", "optimizer.schedule: one of constant, linear"]),
        ("objective", ["chosen by `name`", "\nsdpo\n", "explain objective.KIND"]),
        ("objective.sdpo", ["objective.distill: section", "objective.name"]),
        ("data.train", ["data.train[]", "\ndigit_sums\n", "explain data.train.KIND"]),
    ],
)
def test_explain(path: str, parts: list[str]) -> None:
    text = explain(path)
    assert all(part in text for part in parts), text


def test_a_key_of_several_kinds_is_explained_for_each_default() -> None:
    text = explain("objective.distill.kind")
    assert text.count("objective.distill.kind [") >= 2 and "sdpo" in text
    assert explain("objective.sdpo.distill.kind").count("objective.distill.kind") == 1


def test_explain_without_a_key_lists_the_sections() -> None:
    lines = explain().splitlines()
    for name in ("output: path (required)", "model: section (required)", "rollout: section", "objective: section"):
        assert any(line.startswith(name) for line in lines), name


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("rollout.temprature", "rollout.temprature: unknown key; did you mean temperature?"),
        ("lr", "lr: unknown key; did you mean optimizer.lr or warmup.optimizer.lr?"),
        ("objective.hpdo", "objective.hpdo: unknown key; did you mean hdpo?"),
        ("seed.of", "seed.of: seed is a value, not a section; explain seed"),
    ],
)
def test_an_unknown_key_is_one_line_with_a_suggestion(path: str, says: str) -> None:
    with pytest.raises(RecipeError) as error:
        explain(path)
    assert str(error.value) == says


def test_every_key_has_a_meaning_and_can_be_explained() -> None:
    keys = list(all_keys())
    assert len(keys) > 400
    assert not [key.path for key in keys if not key.meaning]
    for path in dict.fromkeys(key.path for key in keys):
        assert explain(path).startswith(path)


@pytest.mark.parametrize(
    ("name", "option", "generate"),
    [("configuration.md", "--markdown", markdown), ("recipe.schema.json", "--json-schema", json_schema)],
)
def test_generated_files_are_up_to_date(name: str, option: str, generate: Callable[[], str]) -> None:
    file = ROOT / "docs" / name
    assert file.read_text() == generate(), f"run: python -m megatron_hdpo explain {option} > docs/{name}"


def test_the_command_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["explain", "train.steps"])
    assert capsys.readouterr().out == "train.steps\n    Rollout steps.\n    type: integer, >= 0\n    default: 100\n"
    cli.main(["explain", "--json-schema"])
    assert json.loads(capsys.readouterr().out)["required"] == ["output", "model", "data", "objective"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_recipes_name_the_schema_in_their_first_line(recipe: Path) -> None:
    start, _, target = recipe.read_text().splitlines()[0].partition("$schema=")
    assert start == "# yaml-language-server: "
    assert (recipe.parent / target).resolve() == ROOT / "docs" / "recipe.schema.json"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("", "name a key, such as rollout.temperature"),
        ("..", "name a key"),
        ("rollout.temperature.x", "rollout.temperature is a value, not a section"),
        ("data.prompts.chat_template_kwargs.enable_thinking", "chat_template_kwargs is a value"),
    ],
)
def test_what_is_no_key_is_refused(path: str, said: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(said)):
        explain(path)


def test_spaces_around_a_key_do_not_matter() -> None:
    assert explain(" rollout.temperature ") == explain("rollout.temperature")


def test_no_section_takes_a_number_that_is_not_finite() -> None:
    models = {model for key in all_keys() for model in key.node.models}
    assert len(models) > 50 and all(model.model_config.get("allow_inf_nan") is False for model in models)
