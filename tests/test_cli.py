"""The commands beside `train`: what they say, and that they leave a run's folder as it is."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import run_command, run_world
from recipes import Tree

import megatron_hdpo
from megatron_hdpo import cli
from megatron_hdpo.data.prompts import PromptTooLong
from megatron_hdpo.parallel.layout import LayoutError
from megatron_hdpo.types.errors import UserError


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (None, "ReportError: {folder}: no such folder; give the output folder of a run\n"),
        ("folder", "ReportError: {folder}: no metrics.jsonl in it; give the output folder of a run that has made a "
         "step\n"),
        ("empty", "ReportError: {folder}/metrics.jsonl: no finished step in it yet; try again after the first one\n"),
        ("broken", "MetricsFileError: {folder}/metrics.jsonl, line 1: not JSON (Expecting value: line 1 column 1 (char "
         "0)); remove or repair the line\n"),
    ],
)  # fmt: skip
def test_report_of_no_run(prepare: str | None, says: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    if prepare:
        folder.mkdir()
    if prepare in ("empty", "broken"):
        (folder / "metrics.jsonl").write_text("x\n" if prepare == "broken" else "")
    ended = run_command("report", folder)
    assert (ended.codes, ended.stderr) == ([2], [says.format(folder=folder)])


def test_every_error_for_the_user_says_something_of_its_own() -> None:
    for module in pkgutil.walk_packages(megatron_hdpo.__path__, "megatron_hdpo."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    errors, waiting = set[type[UserError]](), [UserError]
    while waiting:
        errors |= set(subclasses := waiting.pop().__subclasses__())
        waiting += subclasses
    assert len(errors) >= 16 and all(error.__doc__ for error in errors)


@pytest.mark.parametrize("error", [UserError("use another"), LayoutError("use another"), PromptTooLong("use another")])
def test_an_error_of_the_user_is_one_line(error: UserError) -> None:
    assert cli._for_the_user(error) == f"{type(error).__name__}: use another"
    assert cli._for_the_user(ValueError("use another")) is None


def train_with_a_defect(recipe: str) -> None:
    from megatron_hdpo.training import run

    def build_run(*args: Any, **kwargs: Any) -> Any:
        raise KeyError("a defect")

    run.build_run = build_run  # type: ignore[assignment]
    cli.main(["train", recipe])


def test_an_error_of_ours_has_a_traceback(tree: Tree, write_recipe: Callable[[Tree], Path]) -> None:
    """Only what the user can mend is said in one line; a bug must show where it is."""
    path = write_recipe(tree)
    ended = run_world(1, train_with_a_defect, str(path))
    assert ended.codes == [1] and "Traceback" in ended.stderr[0] and "KeyError: 'a defect'" in ended.stderr[0], (
        ended.text
    )
    assert yaml.safe_load(path.read_text())
