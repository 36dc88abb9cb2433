"""What tests of the whole loop share: a tiny model made once, and recipes of runs that take seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from recipes import Tree


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: Llama of 2 layers, 4 heads, 17 characters, 128 positions, weights large enough that its
    distributions differ from position to position."""
    from recipes import make_model

    return make_model(tmp_path_factory.mktemp("models") / "tiny-model")


@pytest.fixture(scope="session")
def warmed_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `learning.warm_up_all` writes; three minutes, for all the tests that start from it."""
    from learning import warm_up_all

    root = tmp_path_factory.mktemp("warmed_up")
    warm_up_all(root)
    return root


@pytest.fixture
def tree(tiny_model: Path, tmp_path: Path) -> Tree:
    """A recipe, as YAML would be read, of an HDPO run of two steps on the tiny model into `tmp_path`/run."""
    from recipes import small_recipe

    return small_recipe(tiny_model, tmp_path / "run")


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[[Tree], Path]:
    """Writes a tree as `tmp_path`/recipe.yaml."""

    def write(tree: Tree, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return path

    return write
