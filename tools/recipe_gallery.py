"""Write docs/recipes.md, the page with every recipe of examples/, from the recipes themselves.

    python tools/recipe_gallery.py > docs/recipes.md

A recipe's comments begin with what it does, and with the commands that run it, indented.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _environment  # noqa: F401
import yaml

ROOT = Path(__file__).resolve().parents[1]
GROUPS = {
    "First steps, on a CPU": ("examples/quickstart", "examples/digit_sums"),
    "One for each method, on a CPU": ("examples/methods", "examples/compare"),
    "On GPUs": ("examples/qwen",),
}
HEAD = """# Recipes

Written by `python tools/recipe_gallery.py` (after `source .venv/bin/activate`) from the comments of the recipes: edit
those, not this page.

Run a recipe with `python -m megatron_hdpo train RECIPE`. Change any key on the command line (`train.steps=10`), or in
a copy. [All keys](configuration.md) are in the reference. Those for GPUs have been checked and planned, see
[GPU status](gpu-status.md).
"""


def main() -> None:
    """Print the page."""
    print(page(), end="")


def page() -> str:
    """Return the page."""
    return "\n".join([HEAD, *(line for title, folders in GROUPS.items() for line in _group(title, folders))])


def recipes(folders: tuple[str, ...]) -> list[Path]:
    """Return the recipes below the folders whose names begin with one of `folders`, as paths in the repository."""
    found = (path.relative_to(ROOT) for path in (ROOT / "examples").glob("*/*.yaml"))
    return sorted(path for path in found if str(path).startswith(folders))


def comments(text: str) -> tuple[str, list[str]]:
    """Return the first paragraph of the comments at the top of a recipe, and the commands in them."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    lines = [line for line in lines if "yaml-language-server" not in line]
    paragraph = lines[: lines.index("")] if "" in lines else lines
    commands = "\n".join(line for line in lines if line.startswith("  "))
    return " ".join(paragraph), textwrap.dedent(commands).splitlines()


def _group(title: str, folders: tuple[str, ...]) -> Iterator[str]:
    yield f"## {title}\n"
    yield "| recipe | model | objective | teacher | rollouts | steps |"
    yield "|---|---|---|---|---|---|"
    found = recipes(folders)
    for path in found:
        yield _row(path, yaml.safe_load((ROOT / path).read_text(encoding="utf-8")))
    yield ""
    for path in found:
        yield from _entry(path)


def _row(path: Path, tree: dict[str, Any]) -> str:
    sampling = tree.get("rollout", {})
    cells = [
        f"[{_name(path)}](#{_anchor(path)})",
        Path(tree["model"]["path"]).name,
        f"`{tree['objective']['name']}`",
        f"`{tree.get('teacher', {}).get('kind', 'policy')}`",
        sampling.get("engine", "embedded"),
        str(tree["train"]["steps"]),
    ]
    return f"| {' | '.join(cells)} |"


def _entry(path: Path) -> Iterator[str]:
    what, commands = comments((ROOT / path).read_text(encoding="utf-8"))
    what = re.sub(r"\bdocs/([\w-]+\.md)", r"[docs/\1](\1)", what)
    yield f"### {_name(path)}\n"
    yield f"{textwrap.fill(what, 120, break_long_words=False, break_on_hyphens=False)}\n"
    yield f"[`{path}`](../{path})\n"
    if commands:
        yield "\n".join(["```bash", *commands, "```", ""])


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def _anchor(path: Path) -> str:
    return "".join(letter for letter in _name(path).lower() if letter.isalnum() or letter in "-_")


if __name__ == "__main__":
    main()
