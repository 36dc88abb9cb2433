"""Recipes in YAML files: reading with `key.path=value` overrides, writing, comparing."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_hdpo.config.hub import with_snapshots
from megatron_hdpo.config.recipe import Recipe, RecipeError, parse_recipe
from megatron_hdpo.config.secrets import is_secret, redacted
from megatron_hdpo.config.yaml_text import (
    MAX_CHARACTERS,
    MAX_DEPTH,
    YamlTree,
    one_line,
    problem_of,
    read_yaml,
    write_yaml,
)
from megatron_hdpo.types.secrets import MARK, without_passwords


def load_recipe(path: str | Path, overrides: Sequence[str] = (), snapshots: bool = True) -> Recipe:
    """Return the recipe in a YAML file after `key.path=value` overrides.

    snapshots: put the folders of their snapshots in place of names on the hub (`hub.py`). Raises RecipeError with
    every error found.
    """
    path = Path(path)
    found = _read(path)
    if not isinstance(found.value, dict):
        raise RecipeError(f"{path}: must be a mapping of sections, not {_kind_of(found.value)}")
    tree = found.value
    origins = {apply_override(tree, override): _named(override) for override in overrides}
    recipe = parse_recipe(tree, str(path), origins, found.lines)
    return with_snapshots(recipe) if snapshots else recipe


def _read(path: Path) -> YamlTree:
    try:
        with path.open(encoding="utf-8-sig") as file:
            return read_yaml(file.read(MAX_CHARACTERS + 1))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8 text: {error}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: is not YAML: {problem_of(error)}") from error
    except ValueError as error:  # a path with a NUL character
        raise RecipeError(f"{one_line(str(path))}: cannot be read: {error}") from error


def _kind_of(value: Any) -> str:
    names = {type(None): "nothing (is the file empty?)", list: "a list", str: "a text"}
    return names.get(type(value), "a single value")


def apply_override(tree: dict[str, Any], override: str) -> str:
    """Set one `key.path=value` in a tree of mappings and lists; the value is parsed as YAML. Raises RecipeError.

    Returns the key.path of what it set or made: that of a section if it was not there.
    """
    path, equals, text = override.partition("=")
    named, shown = _named(override), one_line(path)
    if not equals or not path:
        raise RecipeError(f"{named}: write key.path=value")
    node: Any = tree
    *parents, last = re.sub(r"\[(\d+)\]", r".\1", path).split(".")  # data.train[0] is data.train.0
    if len(parents) >= MAX_DEPTH:
        raise RecipeError(f"{named}: the key has more than {MAX_DEPTH} parts")
    made: str | None = None
    for depth, key in enumerate(parents):
        if isinstance(node, dict) and node.get(key) is None:
            made = made or ".".join(parents[: depth + 1])
            node[key] = {}
        node = _child(node, key, named, one_line(".".join(parents[: depth + 1])))
    value = _value(text, named)
    if isinstance(node, list):
        _child(node, last, named, shown)
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise RecipeError(f"{named}: {one_line('.'.join(parents))} is a value, not a section")
    return made or ".".join([*parents, last])


def _value(text: str, named: str) -> Any:
    try:
        return read_yaml(text).value
    except yaml.YAMLError as error:
        hint = "; a template needs quotes inside those of the shell: key='\"{{ question }}\"'" if "{{" in text else ""
        raise RecipeError(f"{named}: the value is not YAML: {problem_of(error)}{hint}") from error


def _named(override: str) -> str:
    """Return what stands for an override in messages, which may end in logs."""
    path, equals, text = override.partition("=")
    shown = MARK if is_secret(path.split(".")) or "environment" in path.split(".") else without_passwords(text)
    return f"override '{one_line(f'{path}{equals}{shown if text else text}')}'"


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the recipe with every default filled in, without its secrets; reading it back gives an equal recipe."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    tree = redacted(recipe.model_dump(mode="json"))
    partial.write_text(write_yaml(tree), encoding="utf-8")
    os.replace(partial, path)  # a recipe that was cut off would stand in the way of every resume


def recipe_changes(path: Path, recipe: Recipe) -> list[str]:
    """Return `key.path: old -> new` for every value that differs from the recipe that `save_recipe` wrote to `path`.

    A file that is no recipe gives one line that says so.
    """
    if not path.is_file():
        return []
    try:
        written = read_yaml(path.read_text(encoding="utf-8")).value
    except (OSError, ValueError, yaml.YAMLError) as error:
        written = error
    if not isinstance(written, dict):
        return [f"{path} cannot be read, so changes are not known"]
    old, new = dict(leaves(redacted(written))), dict(leaves(redacted(recipe.model_dump(mode="json"))))
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in {**old, **new} if old.get(key) != new.get(key)]


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (key.path, value) of every value in a tree of mappings and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if items is None:
        yield path, tree
        return
    for key, value in items:
        yield from leaves(value, f"{path}.{key}" if path else str(key))


def _child(node: Any, key: str, named: str, path: str) -> Any:
    if isinstance(node, list):
        if not re.fullmatch("[0-9]{1,6}", key) or int(key) >= len(node):
            has = f"has items 0 to {len(node) - 1}" if node else "is empty"
            raise RecipeError(f"{named}: {path}: the list {has}")
        return node[int(key)]
    if isinstance(node, dict):
        return node[key]
    raise RecipeError(f"{named}: {path} is below a value, not a section")
