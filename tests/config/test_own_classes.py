"""Objectives and tasks of a user's own in recipes: read, refused, explained, checked, saved and planned like others."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_hdpo.config import RecipeError, check_sections, load_recipe, parse_recipe, save_recipe
from megatron_hdpo.config.explain import explain
from megatron_hdpo.config.file import recipe_changes
from megatron_hdpo.config.references import references
from megatron_hdpo.objectives.base import ObjectiveDeps
from megatron_hdpo.objectives.registry import build_objective
from megatron_hdpo.planner.asked_work import Steps, work_of
from megatron_hdpo.types.plugins import PluginError

ROOT = Path(__file__).parents[2]
OBJECTIVES = '''\
from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from megatron_hdpo.objectives.base import BaseObjective
from megatron_hdpo.objectives.examples import student_example
from megatron_hdpo.objectives.hdpo import HDPO
from megatron_hdpo.objectives.settings import ObjectiveSettings
from megatron_hdpo.types.learning import LossSpec, SurrogateConfig


class Part(BaseModel):
    """A section below."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    share: float = Field(0.5, gt=0, description="A share.")


class Settings(ObjectiveSettings):
    """Settings of mine."""

    strength: int = Field(2, ge=1, description="How strong.")
    part: Part = Field(default_factory=Part, description="A part.")
    parts: list[Part] = Field(default_factory=list, description="More parts.")
    way: Literal["a", "b"] = Field("a", description="Which way.")


class Mine(BaseObjective):
    """Every rollout has the advantage of its strength."""

    config: Settings

    @property
    def loss(self):
        return LossSpec(SurrogateConfig(), None, self.temperature)

    def examples(self, groups, scores, totals=None):
        strength = float(self.config.strength)
        return [student_example(group, sample, strength) for _, group, sample in self.trained(groups)]


class Extended(HDPO):
    """HDPO under another name."""


class NoConfig(BaseObjective):
    loss = examples = None


class NoMethods:
    config: Settings


class NoLoss(BaseObjective):
    config: Settings

    def examples(self, groups, scores, totals): ...


class WrongConfig(Mine):
    config: int


class Unread(Mine):
    config: NotThere


class Careless(BaseModel):
    x: int = 0


class CarelessSettings(ObjectiveSettings):
    parts: list[Careless] | None = None


class CarelessObjective(Mine):
    config: CarelessSettings


class Alone:
    """An objective without a base class, which lacks a value."""

    config: Settings
    privileged_top_logprobs = 0

    def __init__(self, config, deps): ...


for _name in ("loss", "headlines", "privileged_rollouts_for", "keep_privileged", "has_signal", "begin_step", "scorings",
              "totals", "totals_metrics", "examples", "counts", "metrics", "state_dict", "load_state_dict"):
    setattr(Alone, _name, lambda *_: None)


def function(config, deps): ...
'''
TASKS = '''\
from pydantic import Field

from megatron_hdpo.data.tasks import DigitSumsTask
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.task import TaskBase


class Twos(TaskBase):
    """Say two."""

    size: int = Field(4, ge=1, description="Number of problems.")

    def problems(self, report):
        return [Problem(f"{self.task_name}/{i}", self.task_name, "?", "2") for i in range(self.size)]

    def score(self, problem, response):
        return float(response == "2")


class Sums(DigitSumsTask):
    """Sums, scored another way."""


class NoScore(TaskBase):
    def problems(self, report): ...


class NoTask:
    pass
'''
TREE: dict[str, Any] = {
    "output": "runs/own",
    "model": {"path": "nowhere"},
    "data": {
        "train": [{"kind": "tasks.py:Twos", "size": 3}],
        "evaluation": [{"kind": "tasks.py:Sums", "lengths": [2]}],
    },
    "objective": {"name": "lab/mine.py:Mine", "strength": 3, "parts": [{"share": 0.25}]},
    "warmup": {"plain": [{"kind": "tasks.py:Twos"}]},
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    before = set(sys.modules)
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "mine.py").write_text(OBJECTIVES)
    (tmp_path / "tasks.py").write_text(TASKS)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(TREE))
    yield tmp_path
    for name in set(sys.modules) - before:
        if not name.startswith("megatron_hdpo"):
            del sys.modules[name]


def entry_points(folder: Path) -> None:
    info = folder / "my_lab-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-lab\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[megatron_hdpo.objectives]\nmine = lab.mine:Mine\n[megatron_hdpo.tasks]\ntwos = tasks:Twos\n"
    )


def test_sections_are_typed_and_complete() -> None:
    recipe = load_recipe("recipe.yaml")
    assert recipe.objective.name == "lab/mine.py:Mine" and recipe.data.train[0].kind == "tasks.py:Twos"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # pydantic warns of what it cannot write
        tree = recipe.model_dump(mode="json")
    assert tree["objective"] == {
        "name": "lab/mine.py:Mine",
        "cliff_threshold": 0.0,
        "strength": 3,
        "part": {"share": 0.5},
        "parts": [{"share": 0.25}],
        "way": "a",
    }
    assert tree["data"]["train"] == [{"kind": "tasks.py:Twos", "name": None, "weight": None, "limit": None, "size": 3}]
    assert tree["data"]["evaluation"][0]["lengths"] == [2]
    assert set(references(recipe)) == {"lab/mine.py:Mine", "tasks.py:Twos", "tasks.py:Sums"}
    check_sections(recipe)


def test_a_saved_recipe_is_complete_and_reads_back_equal(folder: Path) -> None:
    recipe = load_recipe("recipe.yaml")
    save_recipe(recipe, folder / "saved.yaml")
    assert load_recipe("saved.yaml") == recipe
    assert yaml.safe_load((folder / "saved.yaml").read_text())["objective"]["part"] == {"share": 0.5}
    changed = load_recipe("recipe.yaml", ["objective.part.share=0.75", "data.train.0.size=5"])
    assert recipe_changes(folder / "saved.yaml", changed) == [
        "data.train.0.size: 3 -> 5",
        "objective.part.share: 0.5 -> 0.75",
    ]


@pytest.mark.parametrize(("name", "kind"), [("lab.mine:Mine", "tasks:Twos"), ("mine", "twos")])
def test_modules_and_entry_points_are_read_too(name: str, kind: str, folder: Path) -> None:
    entry_points(folder)
    recipe = load_recipe("recipe.yaml", [f"objective.name={name}", f"data.train.0.kind={kind}"])
    assert recipe.objective.strength == 3 and recipe.data.train[0].size == 3  # type: ignore[attr-defined]
    assert build_objective(recipe.objective, ObjectiveDeps()).config is recipe.objective  # type: ignore[attr-defined]
    assert explain(f"objective.{name}.part.share").startswith("objective.part.share")
    assert not name.islower() or ":" in name or "from installed packages: mine" in explain("objective")


def test_a_class_that_extends_one_of_this_package_has_its_settings() -> None:
    recipe = load_recipe("recipe.yaml", ["objective={name: lab/mine.py:Extended, distill: {top_k: 5}}"])
    objective = build_objective(recipe.objective, ObjectiveDeps())
    assert type(objective).__name__ == "Extended"
    assert objective.loss.distill.top_k == 5 and recipe.objective.name == "lab/mine.py:Extended"  # type: ignore[union-attr]


OVERRIDES = {
    "unknown key": ("objective.strenght=3", "objective.strenght: unknown key; did you mean strength?"),
    "unknown key below": ("objective.part.shrae=3", "objective.part.shrae: unknown key; did you mean share?"),
    "unknown key of a task": ("data.train.0.sizes=3", "data.train.0.sizes: unknown key; did you mean size?"),
    "bounds": ("objective.strength=0", "objective.strength: Input should be greater than or equal to 1 (given: 0)"),
    "type": (
        "objective.strength=many",
        "objective.strength: Input should be a valid integer, unable to parse string as an integer (given: 'many')",
    ),
    "choice": ("objective.way=c", "objective.way: Input should be 'a' or 'b' (given: 'c')"),
    "NaN": ("objective.part.share=.nan", "objective.part.share: Input should be a finite number (given: nan)"),
    "boolean": ("objective.part.share=true", "objective.part.share: must be a number (given: true)"),
    "boolean in a task": ("data.train.0.size=on", "data.train.0.size: must be a number (given: true)"),
    "missing": (
        "data.train={kind: tasks.py:Sums}",
        "data.train: Input should be a valid list (given: a section)",
    ),
    "missing key": ("data.train=[{kind: tasks.py:Sums}]", "data.train.0.lengths: required key is missing"),
    "no file": (
        "objective.name=lab/mina.py:Mine",
        "objective.name: there is no file lab/mina.py in the working directory {folder}",
    ),
    "no class": ("objective.name=lab/mine.py:Min", "objective.name: lab/mine.py has no Min; did you mean Mine?"),
    "no such name": (
        "objective.name=mime",
        "objective.name: mime is not one of grpo, hdpo, opd, vopd, akl, opsd, sdpo, srpo, rlsd, rlcsd, "
        "contrastive_opsd, paced, mine; did you mean mine?",
    ),
    "no near name": ("data.train.0.kind=x", "a class of your own is module:Name or path/to/file.py:Name"),
    "a function": (
        "objective.name=lab/mine.py:function",
        "objective.name: lab/mine.py:function is no objective: it is function, and must be a class",
    ),
    "no objective": (
        "objective.name=lab/mine.py:NoMethods",
        "objective.name: lab/mine.py:NoMethods is no objective: it has no loss, headlines, privileged_rollouts_for, "
        "keep_privileged, has_signal, begin_step, scorings, totals, totals_metrics, examples, counts, metrics, "
        "state_dict, load_state_dict (most extend megatron_hdpo.objectives.base.BaseObjective)",
    ),
    "no loss": (
        "objective.name=lab/mine.py:NoLoss",
        "objective.name: lab/mine.py:NoLoss is no objective: it has no loss (most extend "
        "megatron_hdpo.objectives.base.BaseObjective)",
    ),
    "no annotation": (
        "objective.name=lab/mine.py:NoConfig",
        "objective.name: lab/mine.py:NoConfig does not say what its settings are: annotate `config: YourSettings` in "
        "the class",
    ),
    "wrong annotation": (
        "objective.name=lab/mine.py:WrongConfig",
        "objective.name: lab/mine.py:WrongConfig: the annotation of `config` must be a class that extends "
        "megatron_hdpo.objectives.settings.ObjectiveSettings",
    ),
    "unread annotation": (
        "objective.name=lab/mine.py:Unread",
        "objective.name: lab/mine.py:Unread: its annotations cannot be read: NameError: name 'NotThere' is not defined",
    ),
    "careless section": (
        "objective={name: lab/mine.py:CarelessObjective}",
        "objective.name: lab/mine.py:CarelessObjective: the section Careless would take unknown keys or NaN without a "
        'word: give it model_config = ConfigDict(extra="forbid", allow_inf_nan=False)',
    ),
    "no task": (
        "data.train.0.kind=tasks.py:NoTask",
        "data.train.0.kind: tasks.py:NoTask is no task: its class must extend megatron_hdpo.types.task.TaskBase",
    ),
    "half a task": (
        "data.train.0.kind=tasks.py:NoScore",
        "data.train.0.kind: tasks.py:NoScore is no task yet: it has no score",
    ),
    "a task as objective": (
        "objective.name=tasks.py:Twos",
        "objective.name: tasks.py:Twos is no objective: it has no loss, headlines",
    ),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_what_is_wrong_is_one_line_with_its_key(name: str, folder: Path) -> None:
    entry_points(folder)
    override, says = OVERRIDES[name]
    with pytest.raises(RecipeError) as error:
        load_recipe("recipe.yaml", [override])
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"override '{override}': ") and says.format(folder=folder) in line


def test_an_error_has_its_line_in_the_file(folder: Path) -> None:
    text = (folder / "recipe.yaml").read_text()
    number = text[: text.index("strength")].count("\n") + 1
    (folder / "recipe.yaml").write_text(text.replace("strength: 3", "strength: x"))
    with pytest.raises(RecipeError, match=rf"^recipe.yaml:{number}: objective.strength: Input should be"):
        load_recipe("recipe.yaml")
    (folder / "recipe.yaml").write_text(text.replace("strength: 3", "strong: 3"))
    with pytest.raises(RecipeError, match=rf"^recipe.yaml:{number}: objective.strong: unknown key"):
        load_recipe("recipe.yaml")


def test_an_object_that_lacks_a_value_is_refused_before_it_is_used() -> None:
    recipe = parse_recipe(copy.deepcopy(TREE) | {"objective": {"name": "lab/mine.py:Alone"}})
    with pytest.raises(PluginError, match=r"lab/mine.py:Alone: the object has no max_privileged_prompts after"):
        build_objective(recipe.objective, ObjectiveDeps())


def test_explain_shows_the_keys_of_a_class() -> None:
    text = explain("objective.lab/mine.py:Mine")
    assert "Every rollout" not in text and "Settings of mine." in text
    assert "objective.strength: integer, >= 1 (default: 2)\n    How strong." in text
    assert "default: 0.5" in explain("objective.lab/mine.py:Mine.part.share")
    assert "objective.name: text (required)" in text
    for section in ("data.train", "data.train.0", "data.train[0]", "data.evaluation", "warmup.plain"):
        assert ".size: integer, >= 1 (default: 4)" in explain(f"{section}.tasks.py:Twos")
    for path, says in {
        "objective.lab/mine.py:Min": "objective.lab/mine.py:Min: lab/mine.py has no Min; did you mean Mine?",
        "objective.lab/mine.py:Mine.strenght": "unknown key; did you mean strength?",
        "model.lab/mine.py:Mine": "a class of your own stands below one of data.train",
    }.items():
        with pytest.raises(RecipeError, match=says):
            explain(path)
    assert "a class of your own: module:Name or path/to/file.py:Name" in explain("objective")


def test_the_work_of_an_objective_is_planned() -> None:
    steps = Steps(count=2, updates=1, samples=4, prompt=10, privileged=20, cliff_rate=0.5, solved_rate=0.25)
    assert work_of(load_recipe("recipe.yaml").objective, steps)["trained_share"] == 1.0


def test_a_recipe_with_classes_of_its_own_is_read_without_torch() -> None:
    code = "import sys; from megatron_hdpo.config import load_recipe; load_recipe('recipe.yaml')"
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(ROOT)})
