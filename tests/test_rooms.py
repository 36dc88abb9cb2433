"""Rooms import only rooms below them, and docs/architecture.md shows them in that order."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONTRACT = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
FLOORS = [re.split(r" [|:] ", layer) for layer in reversed(CONTRACT["layers"])]


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Check the order of the rooms of the package in `folder`, against the contract of this project."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    arguments = ["--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    return subprocess.run([*command, *arguments], cwd=folder, capture_output=True, text=True)


def test_rooms_import_only_rooms_below_them():
    checked = lint_imports(ROOT)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize(
    ("room", "line"),
    [("types", "import megatron_hdpo.objectives.grpo"), ("checkpoint", "import megatron_hdpo.teachers.teacher")],
)
def test_an_import_of_a_room_above_or_beside_is_found(room, line, tmp_path):
    shutil.copytree(ROOT / "megatron_hdpo", tmp_path / "megatron_hdpo", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "megatron_hdpo" / room / "__init__.py").open("a") as file:
        file.write(f"\n{line}\n")
    checked = lint_imports(tmp_path)
    assert checked.returncode == 1 and f"megatron_hdpo.{room}" in checked.stdout, checked.stdout + checked.stderr


def test_the_architecture_page_shows_every_room_on_its_floor():
    page = (ROOT / "docs" / "architecture.md").read_text()
    shown = [(int(floor), room) for floor, room in re.findall(r"^\| (\d+) \| `(\w+)` \|", page, re.MULTILINE)]
    assert shown == sorted(shown, key=lambda row: row[0])
    assert {(floor, room) for floor, rooms in enumerate(FLOORS, 1) for room in rooms} == set(shown)


def test_every_room_says_what_it_is_for():
    for path in sorted((ROOT / "megatron_hdpo").rglob("__init__.py")):
        if path.parent.name != "megatron_hdpo":
            lines = path.read_text().partition('"""')[2].partition('"""')[0].splitlines()
            assert 2 <= len(lines) <= 24, f"{path}: say what it is for, what it may import, where to start reading"
