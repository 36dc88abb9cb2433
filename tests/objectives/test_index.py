"""The index of the methods, and how many files a reader of one method needs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from syntax import syntax_tree

import megatron_hdpo.objectives as room
from megatron_hdpo.objectives.registry import OBJECTIVES

FOLDER = Path(room.__file__).parent


def files_of(name: str) -> set[str]:
    """Return the files of objectives/ that the file imports, itself and those of its imports included."""
    found, left = set(), [name]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            nodes = ast.walk(syntax_tree(FOLDER / name))
            modules = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
            left += [f"{m.split('.')[2]}.py" for m in modules if m.startswith("megatron_hdpo.objectives.")]
    return found


def test_the_index_names_every_method_and_its_file() -> None:
    rows = re.findall(r"^\| (\w+) \| (\w+\.py) \| (\S.*) \|$", room.__doc__ or "", re.MULTILINE)
    files = {config.model_fields["name"].default: f"{config.__module__.split('.')[-1]}.py" for config in OBJECTIVES}
    assert {name: file for name, file, _ in rows} == files


def test_the_index_imports_nothing() -> None:
    assert len(syntax_tree(FOLDER / "__init__.py").body) == 1


def test_opsd_is_understood_in_five_files() -> None:
    assert files_of("opsd.py") == {"opsd.py", "distillation.py", "base.py", "settings.py", "examples.py"}


def test_methods_without_rewards_read_no_file_of_grpo_or_hdpo() -> None:
    for name in ("opd", "vopd", "akl", "opsd", "sdpo", "contrastive_opsd", "paced"):
        assert not files_of(f"{name}.py") & {"grpo.py", "hdpo.py"}
