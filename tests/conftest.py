"""What tests of the whole loop share: a tiny model made once, and recipes of runs that take seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from times import write_summary
from unfinished import watch

Tree = dict[str, Any]

ROOT = Path(__file__).parent
# Files that take longest, the longest first: a worker that began one of them last would run alone at the end.
LONGEST = (
    "training/test_learning.py",
    "rollout/sglang/test_server.py",
    "rollout/sglang/test_run_on_sglang.py",
    "model/test_policy_layouts.py",
    "rollout/sglang/test_failover.py",
    "rollout/sglang/test_other_servers.py",
    "training/test_run.py",
    "training/test_two_nodes.py",
    "training/test_run_rewards.py",
    "checkpoint/test_store.py",
    "examples/test_compare.py",
    "planner/test_against_ranks.py",
    "model/test_overlap.py",
    "teachers/test_following.py",
    "objectives/test_opd_gradients.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--summary", type=Path, help="write outcomes and seconds of the tests to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # this process prints; pytest-xdist's workers run the tests
        watch(config)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest files first."""

    def place(item: pytest.Item) -> int:
        name = item.path.relative_to(ROOT).as_posix()
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=place)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    write_summary(terminalreporter, config.getoption("--summary"))


@pytest.fixture(scope="module", autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """Fail the file that leaves a process group in this process: tests of any file after it would find it there."""
    yield
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized():
        dist.destroy_process_group()
        pytest.fail("a test of this file left torch.distributed initialised: start groups in `run_ranks` or end them")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: Llama of 2 layers, 4 heads, 17 characters, 128 positions, weights large enough that its
    distributions differ from position to position."""
    from recipes import make_model

    return make_model(tmp_path_factory.mktemp("models") / "tiny-model")


@pytest.fixture(scope="session")
def warmed_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the warmed-up runs of the long study; minutes, for all the tests that start from them."""
    from learning import LONG, warm_up_all

    root = tmp_path_factory.mktemp("warmed_up")
    warm_up_all(LONG, root)
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
