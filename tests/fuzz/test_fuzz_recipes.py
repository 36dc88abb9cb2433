"""Recipes as text, as trees and as overrides: read, or refused in lines that name what is wrong."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzzing import fuzzed
from hypothesis import given
from hypothesis import strategies as st

from megatron_hdpo.config import Recipe, RecipeError, check_sections, load_recipe, parse_recipe, save_recipe
from megatron_hdpo.config.explain import all_keys, explain
from megatron_hdpo.config.file import recipe_changes
from megatron_hdpo.config.secrets import redacted

GOOD: dict[str, Any] = {
    "output": "runs/fuzz",
    "model": {"path": "nowhere"},
    "data": {"train": [{"kind": "digit_sums", "lengths": [2, 3]}]},
    "objective": {"name": "hdpo"},
}
TEXT = yaml.safe_dump(GOOD)
KEYS = sorted({key.path.replace("[]", ".0") for key in all_keys()})
CHOICES = ["grpo", "hdpo", "opd", "paced", "akl", "srpo", "rlsd", "frozen", "ema", "external", "jsonl", "csv", "sglang"]
CHOICES += ["math:sqrt", "megatron_hdpo.objectives.grpo:GRPO", "no/file.py:Mine", "a:b", ":", "..:x", ".py:x"]
NUMBERS = [0, -1, 1, 2**31, 2**63, -(2**64), 10**400, 1e-300, 1e300, float("inf"), float("nan"), 0.5]
WORDS = ["inf", "1e400", "/", "/dev/null", "~", "a" * 300, "x.jinja", "\ud800", "\0", "{{ question }}", "{{ question"]
PIECES = [
    *"{}[]:,-#&*!|>'\"%@`?~<\t\n ",
    *("- ", ": ", "\n  ", "<<: ", "&a ", "*a", "!!int ", "!!python/name:os ", "---\n", "...", "\\ud800", "\0", "\x85"),
    *("010", "1:30", "1e999", ".inf", ".nan", "0x", "1_0", "true", "null", "2020-13-45", "9" * 30, "{{ question }}"),
    *("output", "model", "path", "data", "train", "kind", "jsonl", "objective", "name", "hdpo", "rollout", "lr"),
]

surrogates = st.text(st.characters(categories=["Cs", "Cc", "Lu"]), max_size=3)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    surrogates,
    st.sampled_from([*CHOICES, *NUMBERS, *WORDS]),
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3))
paths = st.sampled_from(KEYS) | st.lists(st.sampled_from([*GOOD, "train", "0", "", "²", "[0]"]), max_size=4).map(
    ".".join
)
noise = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=12).map("".join)


def read(recipe: Recipe, folder: Path) -> None:
    """What commands do with a recipe before they load anything."""
    try:
        check_sections(recipe)
    except RecipeError as error:
        assert str(error)
    save_recipe(recipe, folder / "saved.yaml")
    assert recipe_changes(folder / "saved.yaml", recipe) == []
    tree = recipe.model_dump(mode="json")
    if redacted(tree) == tree:
        assert load_recipe(folder / "saved.yaml", snapshots=False) == recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@fuzzed
@given(
    st.binary(max_size=40) | noise.map(lambda text: text.encode("utf-8", "surrogatepass")), st.integers(0, len(TEXT))
)
def test_bytes(folder: Path, wrong: bytes, place: int) -> None:
    (folder / "recipe.yaml").write_bytes(TEXT[:place].encode() + wrong + TEXT[place:].encode())
    try:
        recipe = load_recipe(folder / "recipe.yaml")
    except RecipeError as error:
        assert str(error).startswith(f"{folder}/recipe.yaml:")
        return
    read(recipe, folder)


@fuzzed
@given(st.dictionaries(paths, values, max_size=3))
def test_trees(folder: Path, changes: dict[str, Any]) -> None:
    tree = copy.deepcopy(GOOD)
    for path, value in changes.items():
        put(tree, path.split("."), value)
    try:
        recipe = parse_recipe(tree)
    except RecipeError as error:
        assert all(line.startswith("recipe: ") for line in str(error).splitlines())
        return
    read(recipe, folder)


@fuzzed
@given(
    st.lists(
        st.tuples(paths, noise | values.map(lambda value: repr(value))).map("=".join) | noise, min_size=1, max_size=3
    )
)
def test_overrides(folder: Path, overrides: list[str]) -> None:
    (folder / "good.yaml").write_text(TEXT)
    try:
        recipe = load_recipe(folder / "good.yaml", overrides)
    except RecipeError as error:
        assert str(error)
        return
    read(recipe, folder)


@fuzzed
@given(paths | noise)
def test_explained_keys(path: str) -> None:
    try:
        assert explain(path)
    except RecipeError as error:
        assert str(error)


@fuzzed
@given(st.binary(max_size=60) | noise.map(lambda text: text.encode("utf-8", "surrogatepass")), st.integers(0, 2000))
def test_saved_recipes(folder: Path, wrong: bytes, place: int) -> None:
    recipe = parse_recipe(GOOD)
    save_recipe(recipe, folder / "damaged.yaml")
    text = (folder / "damaged.yaml").read_bytes()
    (folder / "damaged.yaml").write_bytes(text[:place] + wrong + text[place:])
    assert isinstance(recipe_changes(folder / "damaged.yaml", recipe), list)


def put(tree: Any, path: list[str], value: Any) -> None:
    """Set a value where the path leads to; does nothing where it leads nowhere."""
    *parents, last = path
    for part in parents:
        if isinstance(tree, list):
            tree = tree[0] if tree else None
        elif isinstance(tree, dict):
            tree = tree.setdefault(part, {})
    if isinstance(tree, dict):
        tree[last] = value
    elif isinstance(tree, list) and tree:
        tree[0] = value
