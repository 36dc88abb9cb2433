"""A recipe that asks for a package which is not installed is refused before anything slow."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from recipes import Tree

from megatron_hdpo import environment
from megatron_hdpo.config import RecipeError, check_recipe, check_sections, parse_recipe
from megatron_hdpo.config.packages import unknown_packages
from megatron_hdpo.model.architecture import read_architecture

GYM = {"kind": "reasoning_gym", "dataset": "chain_sum"}
HUB = {"kind": "huggingface", "dataset": "d/e"}


def without(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(environment, "project_is_installed", lambda: True)


def put(tree: Tree, key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        tree = tree.setdefault(part, {})
    tree[last] = value


@pytest.mark.parametrize(
    ("package", "key", "value", "where", "extra"),
    [
        ("reasoning_gym", "data.train", [GYM], "data.train.0.kind=reasoning_gym", "tasks"),
        ("datasets", "data.evaluation", [GYM, HUB], "data.evaluation.1.kind=huggingface", "datasets"),
        ("datasets", "data.train", [HUB], "data.train.0.kind=huggingface", "datasets"),
        ("tensorboard", "tracking.tensorboard", True, "tracking.tensorboard", "tensorboard"),
        ("wandb", "tracking.wandb", {"project": "p"}, "tracking.wandb", "tracking"),
        ("mlflow", "tracking.mlflow", {"uri": "u"}, "tracking.mlflow", "tracking"),
    ],
)
def test_a_missing_package_is_named_with_its_key_and_its_extra(
    package: str, key: str, value: Any, where: str, extra: str, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tree, key, value)
    without(package, monkeypatch)
    if package != "reasoning_gym":
        monkeypatch.setitem(sys.modules, "reasoning_gym", sys)  # there, whatever this environment has
    with pytest.raises(RecipeError) as error:
        check_sections(parse_recipe(tree))
    install = f"pip install 'megatron-hdpo[{extra}]'"
    assert str(error.value) == f"{where}: {package} is not installed for {sys.executable}: {install}"


def test_a_check_for_another_machine_asks_only_for_the_packages_of_the_data(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tree, "tracking.mlflow", {"uri": "u"})
    without("mlflow", monkeypatch)
    check_sections(parse_recipe(tree), elsewhere=True)
    assert list(unknown_packages(parse_recipe(tree))) == ["tracking.mlflow: the package mlflow is not installed here"]
    put(tree, "data.train", [HUB])
    without("datasets", monkeypatch)
    with pytest.raises(RecipeError) as error:
        check_sections(parse_recipe(tree), elsewhere=True)
    assert "datasets is not installed" in str(error.value) and "mlflow" not in str(error.value)


def test_tensorboard_that_nobody_asked_for_is_left_out_with_a_warning(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parse_recipe(tree)
    architecture = read_architecture(recipe.model.path)

    def said() -> list[str]:
        return [line for line in check_recipe(recipe, architecture, 1) if line.startswith("tracking.tensorboard: ")]

    assert said() == [] and recipe.tracking.writes_tensorboard
    without("tensorboard", monkeypatch)
    (line,) = said()
    assert "no events are written" in line and "pip install 'megatron-hdpo[tensorboard]', or set it to false" in line
    assert not recipe.tracking.writes_tensorboard


def test_a_command_that_lacks_a_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    without("matplotlib", monkeypatch)
    said = environment.missing_package(ModuleNotFoundError(name="matplotlib.axes"))
    install = "pip install 'megatron-hdpo[report]'"
    assert said == f"matplotlib.axes is not installed for {sys.executable}: {install}"
