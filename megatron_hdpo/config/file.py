"""Recipes in YAML files: reading with `key.path=value` overrides, writing, comparing."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_hdpo.config.hub import with_snapshots
from megatron_hdpo.config.recipe import Recipe, RecipeError, parse_recipe


def load_recipe(path: str | Path, overrides: Sequence[str] = (), snapshots: bool = True) -> Recipe:
    """Return the recipe in a YAML file after `key.path=value` overrides.

    snapshots: put the folders of their snapshots in place of names on the hub (`hub.py`). Raises RecipeError with
    every error found.
    """
    path = Path(path)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8 text: {error}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: {_yaml_problem(error)}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: must be a mapping of sections, not {type(tree).__name__}")
    tree = _unshared(tree)
    origins = {apply_override(tree, override): f"override '{override}'" for override in overrides}
    recipe = parse_recipe(tree, str(path), origins)
    return with_snapshots(recipe) if snapshots else recipe


def apply_override(tree: dict[str, Any], override: str) -> str:
    """Set one `key.path=value` in a tree of mappings and lists; the value is parsed as YAML. Raises RecipeError.

    Returns the key.path of what it set or made: that of a section if it was not there.
    """
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"override '{override}': write key.path=value")
    node: Any = tree
    *parents, last = re.sub(r"\[(\d+)\]", r".\1", path).split(".")  # data.train[0] is data.train.0
    made: str | None = None
    for depth, key in enumerate(parents):
        if isinstance(node, dict) and node.get(key) is None:
            made = made or ".".join(parents[: depth + 1])
            node[key] = {}
        node = _child(node, key, override, ".".join(parents[: depth + 1]))
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        hint = "; a template needs quotes inside those of the shell: key='\"{{ question }}\"'" if "{{" in text else ""
        raise RecipeError(f"override '{override}': the value {_yaml_problem(error)}{hint}") from error
    if isinstance(node, list):
        _child(node, last, override, path)
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise RecipeError(f"override '{override}': {'.'.join(parents)} is a value, not a section")
    return made or ".".join([*parents, last])


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the recipe with every default filled in; reading it back gives an equal recipe."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    os.replace(partial, path)  # a recipe that was cut off would stand in the way of every resume


def recipe_changes(path: Path, recipe: Recipe) -> list[str]:
    """Return `key.path: old -> new` for every value that differs from the recipe that `save_recipe` wrote to `path`.

    A file that is no recipe gives one line that says so.
    """
    if not path.is_file():
        return []
    try:
        written = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        written = error
    if not isinstance(written, dict):
        return [f"{path} cannot be read, so changes are not known"]
    old, new = dict(leaves(written)), dict(leaves(recipe.model_dump(mode="json")))
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in {**old, **new} if old.get(key) != new.get(key)]


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (key.path, value) of every value in a tree of mappings and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if items is None:
        yield path, tree
        return
    for key, value in items:
        yield from leaves(value, f"{path}.{key}" if path else str(key))


def _child(node: Any, key: str, override: str, path: str) -> Any:
    if isinstance(node, list):
        if not key.isdigit() or int(key) >= len(node):
            has = f"has items 0 to {len(node) - 1}" if node else "is empty"
            raise RecipeError(f"override '{override}': {path}: the list {has}")
        return node[int(key)]
    if isinstance(node, dict):
        return node[key]
    raise RecipeError(f"override '{override}': {path} is below a value, not a section")


class _Loader(yaml.SafeLoader):
    """YAML loader that refuses a key given twice; PyYAML would silently keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen and key_node.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key} is given twice", key_node.start_mark
                )
            seen.add(key if isinstance(key, Hashable) else None)
        return super().construct_mapping(node, deep)


def _unshared(node: Any) -> Any:
    """Return the tree with a copy for every alias (`*name`), so that an override changes only the place it names."""
    if isinstance(node, dict):
        return {key: _unshared(value) for key, value in node.items()}
    return [_unshared(value) for value in node] if isinstance(node, list) else node


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"is not YAML: {' '.join(str(error).split())}"
    return f"is not YAML: line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', None)}"
