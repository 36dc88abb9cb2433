"""A recipe without a teacher gets the one of the method's paper, in writing, or does not start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_hdpo.config import RecipeError, check_sections, load_recipe, parse_recipe
from megatron_hdpo.config.explain import explain
from megatron_hdpo.config.file import save_recipe
from megatron_hdpo.objectives.registry import OBJECTIVES

PAPERS: dict[str, dict[str, Any] | None] = {
    "grpo": {"kind": "policy"},
    "hdpo": {"kind": "policy"},
    "opsd": {"kind": "frozen"},
    "contrastive_opsd": {"kind": "frozen"},
    "paced": {"kind": "frozen"},
    "sdpo": {"kind": "ema", "decay": 0.95, "clock": "rollout_step"},
    "srpo": {"kind": "ema", "decay": 0.95, "clock": "rollout_step"},
    "rlsd": {"kind": "snapshot", "every": 10, "clock": "rollout_step"},
    "rlcsd": {"kind": "snapshot", "every": 10, "clock": "rollout_step"},
    "opd": None,
    "vopd": None,
    "akl": None,
}


def tree(name: str, output: Path = Path("runs/x"), **sections: Any) -> dict[str, Any]:
    data = {"train": [{"kind": "digit_sums", "name": "sums", "lengths": [2]}]}
    return {"output": str(output), "model": {"path": "m"}, "data": data, "objective": {"name": name}} | sections


def test_the_table_has_every_method() -> None:
    assert PAPERS.keys() == {config.model_fields["name"].default for config in OBJECTIVES}


@pytest.mark.parametrize("name", [name for name, teacher in PAPERS.items() if teacher])
def test_the_default_is_that_of_the_paper_and_is_saved(name: str, tmp_path: Path) -> None:
    recipe = parse_recipe(tree(name, tmp_path))
    check_sections(recipe)
    assert recipe.teacher.model_dump() == PAPERS[name]
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert f"kind: {PAPERS[name]['kind']}" in (tmp_path / "recipe.yaml").read_text()  # type: ignore[index]
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize("name", [name for name, teacher in PAPERS.items() if teacher is None])
@pytest.mark.parametrize("more", [{}, {"tokens": "teacher"}])
def test_a_method_about_another_model_needs_the_section(name: str, more: dict[str, str]) -> None:
    objective = {"name": name} | (more if name == "akl" else {})
    with pytest.raises(RecipeError, match=f"^teacher: objective {name} needs one: set teacher.kind to "):
        check_sections(parse_recipe(tree(name, objective=objective)))
    external = {"kind": "external", "path": "elsewhere"}
    check_sections(parse_recipe(tree(name, objective=objective, teacher=external)))


@pytest.mark.parametrize("name", ["opsd", "sdpo", "rlcsd", "paced"])
def test_the_drifting_policy_is_taken_where_it_is_named(name: str) -> None:
    recipe = parse_recipe(tree(name, teacher={"kind": "policy"}))
    check_sections(recipe)
    assert recipe.teacher.kind == "policy"


def test_an_override_of_the_method_chooses_its_teacher(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(
        "output: x\nmodel: {path: m}\ndata: {train: [{kind: digit_sums, lengths: [2]}]}\nobjective: {name: hdpo}\n"
    )
    assert load_recipe(file).teacher.kind == "policy"
    assert load_recipe(file, ["objective.name=sdpo"]).teacher.kind == "ema"
    assert load_recipe(file, ["objective.name=sdpo", "teacher.kind=frozen"]).teacher.kind == "frozen"


def test_explain_says_every_default() -> None:
    text = " ".join(explain("teacher").split())
    for kind in ("frozen", "ema", "snapshot"):
        names = [name for name, teacher in PAPERS.items() if teacher and teacher["kind"] == kind]
        clause = next(part for part in text.split(";") if all(f" {name}" in part for name in names))
        assert kind in clause
    assert "opd, vopd and akl need the section" in text
