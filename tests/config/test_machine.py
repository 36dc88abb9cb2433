"""What this machine must have: variables of torchrun, and a folder that a run can write into."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import run_command
from recipes import Tree

from megatron_hdpo.config import RecipeError, parse_recipe
from megatron_hdpo.config.machine import check_ranks_of_torchrun, folder_errors

PLACE = {"MASTER_ADDR": "node0", "MASTER_PORT": "29400"}
RIGHT = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", **PLACE}


@pytest.mark.parametrize("environment", [{}, RIGHT, {"LOCAL_RANK": "3"}, {"RANK": "0", "WORLD_SIZE": "1", **PLACE}])
def test_variables_that_torchrun_sets(environment: dict[str, str]) -> None:
    check_ranks_of_torchrun(environment)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"WORLD_SIZE": "0"}, "the environment variable WORLD_SIZE is '0', not a number from 1 on"),
        ({"WORLD_SIZE": "many"}, "the environment variable WORLD_SIZE is 'many', not a number from 1 on"),
        ({"WORLD_SIZE": ""}, "the environment variable WORLD_SIZE is '', not a number from 1 on"),
        ({"WORLD_SIZE": "²"}, "the environment variable WORLD_SIZE is '²', not a number from 1 on"),
        ({"RANK": "-1"}, "the environment variable RANK is '-1', not a number from 0 on"),
        ({"RANK": "2"}, "the environment variable RANK is 2, but WORLD_SIZE is 2"),
        ({"LOCAL_RANK": "x"}, "the environment variable LOCAL_RANK is 'x', not a number from 0 on"),
        ({"LOCAL_RANK": "1"}, "the environment variable LOCAL_RANK is 1, but LOCAL_WORLD_SIZE is 1"),
        ({"LOCAL_WORLD_SIZE": "x"}, "the environment variable LOCAL_WORLD_SIZE is 'x', not a number from 1 on"),
        ({"WORLD_SIZE": None}, "the environment variable RANK is set without WORLD_SIZE"),
        ({"MASTER_ADDR": None}, "the environment variable RANK is set without MASTER_ADDR"),
        ({"MASTER_PORT": None}, "the environment variable RANK is set without MASTER_PORT"),
        ({"RANK": None}, "the environment variable WORLD_SIZE is set without RANK"),
    ],
)
def test_variables_that_torchrun_does_not_set(wrong: dict[str, str | None], says: str) -> None:
    environment = {name: value for name, value in {**RIGHT, **wrong}.items() if value is not None}
    with pytest.raises(RecipeError) as error:
        check_ranks_of_torchrun(environment)
    assert str(error.value) == f"{says}; start ranks with torchrun, or unset it"


def test_a_folder_that_cannot_be_written(tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = parse_recipe(tree | {"output": str(tmp_path / "locked" / "a" / "b")})
    assert list(folder_errors(recipe)) == []
    (tmp_path / "locked").mkdir(mode=0o500)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "locked")  # root may write anywhere
    says = f"output: the folder {tmp_path}/locked cannot be written: Permission denied"
    assert list(folder_errors(recipe)) == [says]
    assert not (tmp_path / "locked" / "a").exists()


@pytest.mark.parametrize("command", ["check", "train"])
def test_commands_say_it_in_one_line(
    command: str, tree: Tree, write_recipe: Callable[[Tree], Path], tmp_path: Path
) -> None:
    ended = run_command(command, write_recipe(tree), environment={"WORLD_SIZE": "0"})
    says = "the environment variable WORLD_SIZE is '0', not a number from 1 on; start ranks with torchrun, or unset it"
    assert (ended.codes, ended.stderr) == ([2], [f"RecipeError: {says}\n"])
    assert not (tmp_path / "run").exists()
