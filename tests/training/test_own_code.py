"""Code of the user's own in a run: the same on all ranks, copied into the run folder, unchanged at a resume."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_hdpo.config import Recipe, RecipeError, parse_recipe
from megatron_hdpo.training.own_code import check_same_code, save_code
from megatron_hdpo.training.start import _check_code

CODE = "from megatron_hdpo.objectives.grpo import GRPO\n\n\nclass Mine(GRPO):\n    pass\n"
TASK = "from megatron_hdpo.data.tasks import DigitSumsTask\n\n\nclass Sums(DigitSumsTask):\n    pass\n"
OTHER = CODE + "# another line\n"
STATE = {"step": 1, "tensor_parallel": 1, "pipeline_parallel": 1, "architecture": {}}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.chdir(tmp_path)
    for name, text in {"mine.py": CODE, "lab/mine.py": TASK}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    train = [{"kind": "lab/mine.py:Sums", "name": "own", "lengths": [2]}, {"kind": "digit_sums", "lengths": [3]}]
    return parse_recipe(
        {
            "output": str(tmp_path / "run"),
            "model": {"path": "nowhere"},
            "data": {"train": train},
            "objective": {"name": "mine.py:Mine"},
        }
    )


def ranks(*others: dict[str, str]) -> Any:
    return SimpleNamespace(gather_objects=lambda own: [own, *others])


OWN = {"mine.py:Mine": digest(CODE), "lab/mine.py:Sums": digest(TASK)}


def test_ranks_with_the_same_code_pass(recipe: Recipe) -> None:
    assert check_same_code(recipe, ranks(OWN, OWN)) == OWN


@pytest.mark.fault(
    "a node has another version of a file that the recipe refers to",
    phase="start",
    seen="an error with the reference and the rank",
    lost="nothing",
)
def test_a_rank_with_other_code_is_named(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match=r"^mine\.py:Mine: the code of rank 2 is not that of rank 0"):
        check_same_code(recipe, ranks(OWN, OWN | {"mine.py:Mine": digest(OTHER)}))


def test_files_are_copied_as_they_were_loaded(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OTHER)  # edited after the recipe was read
    copies = {path.name: path.read_text() for path in save_code(recipe, tmp_path / "run" / "code")}
    (second,) = [name for name in copies if name != "mine.py"]
    assert sorted(copies.values()) == sorted([CODE, TASK])
    assert second == f"mine-{digest(copies[second])[:8]}.py"
    before = {path: path.read_bytes() for path in (tmp_path / "run" / "code").iterdir()}
    save_code(recipe, tmp_path / "run" / "code")
    assert {path: path.read_bytes() for path in (tmp_path / "run" / "code").iterdir()} == before


def run_of(code: dict[str, str], accepts: bool = False) -> Any:
    warnings: list[str] = []
    return SimpleNamespace(
        checkpoints=SimpleNamespace(code=code),
        recipe=SimpleNamespace(output=Path("runs/it")),
        accept_changes=accepts,
        console=SimpleNamespace(warn=warnings.append, warnings=warnings),
    )


@pytest.mark.fault(
    "a file that the recipe refers to has changed since the run began",
    phase="resuming",
    seen="an error with the reference, and `--accept-changes`",
    lost="nothing",
)
def test_changed_code_is_refused_or_accepted(tmp_path: Path) -> None:
    (tmp_path / "run_state.json").write_text(json.dumps(STATE | {"code": OWN}))
    changed = OWN | {"mine.py:Mine": digest(OTHER)}
    with pytest.raises(RecipeError, match=r"^mine\.py:Mine: the code has changed .* by --accept-changes$"):
        _check_code(run_of(changed), tmp_path)
    accepting = run_of(changed, accepts=True)
    _check_code(accepting, tmp_path)
    assert accepting.console.warnings == ["mine.py:Mine: the run goes on with changed code"]


def test_unchanged_code_and_what_the_recipe_changes_is_not(tmp_path: Path) -> None:
    (tmp_path / "run_state.json").write_text(json.dumps(STATE | {"code": OWN}))
    _check_code(run_of(OWN), tmp_path)
    _check_code(run_of({"other.py:Mine": digest(OTHER)}), tmp_path)
    (tmp_path / "run_state.json").write_text(json.dumps(STATE))  # of an older version
    _check_code(run_of(OWN), tmp_path)
