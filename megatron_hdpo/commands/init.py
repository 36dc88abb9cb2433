"""`megatron_hdpo init`: a copy of a shipped recipe, with all that it names, in the user's folder."""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_hdpo.commands.base import PROGRAM, Command
from megatron_hdpo.types.errors import UserError

INSTALLED, IN_REPOSITORY = Path(__file__).parents[1] / "recipes", Path(__file__).parents[2] / "examples"
PARTS_OF_OTHERS = ("compare", "quickstart")
"""Folders whose recipes are a part of something else: not listed, but copied where another recipe names them."""
SCHEMA = "recipe.schema.json"
_RECIPE = re.compile(r"examples/([\w.-]+/[\w.-]+)\.yaml")
_SCHEMA_LINE = re.compile(r"# yaml-language-server: .*\n")
_SCRIPTS = "examples/cluster"


class InitError(UserError, ValueError):
    """A recipe that is not shipped, or a file that is in the way."""


def recipes_folder() -> Path:
    """Return the folder of the shipped recipes: a wheel holds the repository's `examples` as megatron_hdpo/recipes."""
    return INSTALLED if INSTALLED.is_dir() else IN_REPOSITORY


def shipped() -> dict[str, Path]:
    """Return the recipes that can be copied, by name."""
    folder = recipes_folder()
    files = (path for path in sorted(folder.glob("*/*.yaml")) if path.parent.name not in PARTS_OF_OTHERS)
    return {f"{path.parent.name}/{path.stem}": path for path in files}


def copy_recipe(name: str, folder: Path) -> list[Path]:
    """Copy a shipped recipe into `folder`; return the files written, the recipe first.

    Recipes and launch scripts that its text names are copied too, and named where they are now. Raises InitError when a
    recipe has no such name or its file exists.
    """
    wanted = _named_recipes(_found(name))
    targets = {name: folder / f"{name.replace('/', '-')}.yaml" for name in wanted}
    if taken := [str(target) for target in targets.values() if target.exists()]:
        raise InitError(f"{taken[0]} exists already: remove it, or give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    scripts = folder / "cluster"
    for name, target in targets.items():
        text = _SCHEMA_LINE.sub("", wanted[name])
        text = _RECIPE.sub(lambda found: str(targets[found[1]]) if found[1] in targets else found[0], text)
        made = f"# yaml-language-server: $schema={SCHEMA}\n# Made by `{PROGRAM} init {name}`.\n#\n"
        target.write_text(made + text.replace(_SCRIPTS, str(scripts)), encoding="utf-8")
    written = [*targets.values(), _write_schema(folder)]
    if any(_SCRIPTS in text for text in wanted.values()):
        written += _copy_scripts(scripts)
    return written


def _found(name: str) -> str:
    """Return the full name of the recipe that `name` means; either half of it does where only one recipe has it."""
    known = shipped()
    if name in known:
        return name
    inside = [full for full in known if name in full.split("/")]
    if len(inside) == 1:
        return inside[0]
    choices = ", ".join(inside or known)
    raise InitError(f"{name}: is not the name of a recipe; choose one of {choices}")


def _named_recipes(name: str) -> dict[str, str]:
    """Return the text of a recipe and of those that it names, by name."""
    found: dict[str, str] = {}
    waiting = [name]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = (recipes_folder() / f"{name}.yaml").read_text(encoding="utf-8")
            waiting += _RECIPE.findall(found[name])
    return found


def _write_schema(folder: Path) -> Path:
    """Write the schema, by which editors complete and check the recipe's keys."""
    from megatron_hdpo.config.explain import json_schema

    path = folder / SCHEMA
    path.write_text(json_schema(), encoding="utf-8")
    return path


def _copy_scripts(folder: Path) -> Iterator[Path]:
    """Copy the launch scripts; what they say of themselves names their new place."""
    folder.mkdir(exist_ok=True)
    for script in sorted((recipes_folder() / "cluster").iterdir()):
        target = folder / script.name
        target.write_text(script.read_text(encoding="utf-8").replace(_SCRIPTS, str(folder)), encoding="utf-8")
        shutil.copymode(script, target)
        yield target


def summary_of(text: str) -> str:
    """Return the first sentence of the comment at the top of a recipe."""
    lines = _SCHEMA_LINE.sub("", text).splitlines()
    comment = []
    for line in lines:
        if not line.startswith("#") or line == "#":
            break
        comment.append(line.removeprefix("#").strip())
    return re.split(r"(?<=\.)\s", " ".join(comment))[0]


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="recipe; without it, all recipes are listed")
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path(), metavar="FOLDER", help="folder to write to (default: this one)"
    )


def _init(arguments: argparse.Namespace) -> None:
    if arguments.name is None:
        _list()
        return
    recipe, *others = copy_recipe(arguments.name, arguments.folder)
    print(f"{recipe}: made; its first lines say how to run it")
    if others:
        print(f"with it: {', '.join(map(str, others))}")


def _list() -> None:
    known = shipped()
    width = max(map(len, known))
    room = max(shutil.get_terminal_size((120, 24)).columns - width - 2, 20)
    for name, path in known.items():
        summary = summary_of(path.read_text(encoding="utf-8"))
        shown = summary if len(summary) <= room else summary[: room - 3].rstrip() + "..."
        print(f"{name:<{width}}  {shown}")


COMMAND = Command(
    "init",
    "Copy a shipped recipe, or list the recipes.",
    _add,
    _init,
    description="""\
Copies what the recipe names too: other recipes, launch scripts, and the schema
by which editors complete its keys.""",
    examples=("", "digit_sums", "methods/opd my-study"),
)
