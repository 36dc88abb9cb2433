"""Objects that recipes name: found by module, file and entry point, or refused in one line that says why."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hdpo.types.plugins import PluginError, entry_point_names, load_reference

GROUP = "megatron_hdpo.tests"
CODE = """\
from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Mine:
    size: int = 3


def scored(response: str) -> float:
    return 1.0
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory of its own; what is imported from it is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "mine.py").write_text(CODE)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def package(folder: Path, name: str, **entries: str) -> None:
    """An installed package with entry points."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = "".join(f"{key} = {value}\n" for key, value in entries.items())
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{lines}")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def test_a_file_is_loaded_by_a_relative_and_an_absolute_path(folder: Path) -> None:
    for reference in ("lab/mine.py:Mine", f"{folder}/lab/mine.py:Mine", "./lab/../lab/mine.py:Mine"):
        found = load_reference(reference, GROUP)
        assert found.value().size == 3 and found.reference == reference
        assert found.file == folder / "lab" / "mine.py" and found.source == CODE.encode()
        assert found.sha256 == hashlib.sha256(CODE.encode()).hexdigest()
    assert load_reference("lab/mine.py:Mine", GROUP) == load_reference("lab/mine.py:Mine", GROUP)
    assert load_reference("lab/mine.py:scored", GROUP).value("x") == 1.0


def test_an_edited_file_is_another_module(folder: Path) -> None:
    before = load_reference("lab/mine.py:Mine", GROUP)
    (folder / "lab" / "mine.py").write_text(CODE.replace("3", "4"))
    after = load_reference("lab/mine.py:Mine", GROUP)
    assert (before.value().size, after.value().size) == (3, 4)
    assert before.value.__module__ != after.value.__module__ and before.sha256 != after.sha256


def test_two_files_of_one_name_are_two_modules(folder: Path) -> None:
    (folder / "mine.py").write_text(CODE)
    assert load_reference("mine.py:Mine", GROUP).value is not load_reference("lab/mine.py:Mine", GROUP).value


def test_a_module_is_loaded_from_the_working_directory_too(folder: Path) -> None:
    sys.path[:] = [entry for entry in sys.path if entry not in ("", os.getcwd())]
    found = load_reference("lab.mine:Mine", GROUP)
    assert found.value.__module__ == "lab.mine" and found.file == folder / "lab" / "mine.py"


def test_the_file_of_a_module_is_the_one_that_defines_the_object(folder: Path) -> None:
    (folder / "lab" / "__init__.py").write_text("from lab.mine import Mine\n")
    found = load_reference("lab:Mine", GROUP)
    assert found.file == folder / "lab" / "mine.py" and found.source == CODE.encode()
    assert load_reference("math:sqrt", GROUP).sha256 == ""


def test_an_entry_point_is_loaded(folder: Path) -> None:
    package(folder, "my-lab", good="lab.mine:Mine")
    found = load_reference("good", GROUP)
    assert found.value().size == 3 and found.file == folder / "lab" / "mine.py" and found.reference == "good"
    assert entry_point_names(GROUP) == ["good"]


WRONG = {
    "no file": ("lab/mina.py:Mine", "there is no file lab/mina.py in the working directory {folder}"),
    "no absolute file": ("/nowhere/mine.py:Mine", "there is no file /nowhere/mine.py"),
    "a folder": ("lab/folder.py:Mine", "lab/folder.py cannot be read: Is a directory"),
    "no module": (
        "no_such_lab.mine:Mine",
        "there is no module no_such_lab: install its package, put its folder into PYTHONPATH, or name its file "
        "(path/to/file.py:Name)",
    ),
    "no module in a package": (
        "lab.mina:Mine",
        "there is no module lab.mina: install its package, put its folder into PYTHONPATH, or name its file "
        "(path/to/file.py:Name)",
    ),
    "neither": ("lab/mine:Mine", "lab/mine is neither a module (package.module) nor a file (its name ends in .py)"),
    "a near name": ("lab/mine.py:Mime", "lab/mine.py has no Mime; did you mean Mine?"),
    "no near name": ("lab/mine.py:Elsewhere", "lab/mine.py has no Elsewhere; it defines Mine, scored"),
    "nothing": ("lab/empty.py:Mine", "lab/empty.py has no Mine; it defines nothing"),
    "no name": ("lab/mine.py:", "lab/mine.py:: after the colon stands the name of a class or function"),
    "raises": (
        "lab/raises.py:Mine",
        "{folder}/lab/raises.py cannot be imported: ZeroDivisionError: division by zero ({folder}/lab/raises.py, line "
        "2)",
    ),
    "exits": (
        "lab/exits.py:Mine",
        "{folder}/lab/exits.py cannot be imported: SystemExit: 3 ({folder}/lab/exits.py, line 1)",
    ),
    "raises below": (
        "lab.imports:Mine",
        "lab.imports cannot be imported: ZeroDivisionError: division by zero ({folder}/lab/raises.py, line 2)",
    ),
    "lacks a package": (
        "lab/lacks.py:Mine",
        "{folder}/lab/lacks.py cannot be imported: ModuleNotFoundError: No module named 'no_such_lab' "
        "({folder}/lab/lacks.py, line 1)",
    ),
    "no Python": (
        "lab/wrong.py:Mine",
        "{folder}/lab/wrong.py cannot be imported: SyntaxError: invalid syntax ({folder}/lab/wrong.py, line 2)",
    ),
    "two packages": (
        "twice",
        "the packages my-lab and your-lab both have an entry point twice in megatron_hdpo.tests: name module:Name",
    ),
    "no entry point": (
        "goud",
        "no installed package has an entry point goud in megatron_hdpo.tests; did you mean good?",
    ),
    "an entry point to nothing": ("bad", "entry point bad of my-lab: lab.mine has no Mime; did you mean Mine?"),
    "an entry point to a module": ("module", "entry point module of my-lab is lab.mine: it must be module:Name"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_loaded_is_one_line(name: str, folder: Path) -> None:
    (folder / "lab" / "folder.py").mkdir()
    files = {
        "empty": "",
        "raises": "x = 0\ny = 1 / x\n",
        "exits": "raise SystemExit(3)\n",
        "imports": "from lab import raises\n",
        "lacks": "import no_such_lab\n",
        "wrong": "x = 1\nclass :\n",
    }
    for file, text in files.items():
        (folder / "lab" / f"{file}.py").write_text(text)
    package(folder, "my-lab", good="lab.mine:Mine", twice="lab.mine:Mine", bad="lab.mine:Mime", module="lab.mine")
    package(folder, "your-lab", twice="lab.other:Mine")
    reference, says = WRONG[name]
    with pytest.raises(PluginError) as error:
        load_reference(reference, GROUP)
    assert str(error.value) == says.format(folder=folder)
    assert not [module for module in sys.modules if module.startswith(("recipe_file_raises", "recipe_file_exits"))]


@given(st.text(max_size=20) | st.lists(st.sampled_from([*"/.:~\0\ud800 ", "mine", ".py", ".."])).map("".join))
def test_any_text_is_loaded_or_refused(text: str) -> None:
    try:
        load_reference(f"lab_{text}:Mine", GROUP)
    except PluginError as error:
        assert len(str(error).splitlines()) == 1


def test_loading_imports_no_torch(folder: Path) -> None:
    code = "import sys; from megatron_hdpo.types.plugins import load_reference; import megatron_hdpo.types.shipped; "
    code += "load_reference('lab/mine.py:Mine', 'group'); assert 'torch' not in sys.modules"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(root)})
