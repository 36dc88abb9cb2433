"""Secrets of a recipe: what is written and shown has none, and a run that goes on from it finds no difference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recipes import Tree

from megatron_hdpo.config import RecipeError, load_recipe, parse_recipe, save_recipe
from megatron_hdpo.config.file import recipe_changes
from megatron_hdpo.config.secrets import redacted
from megatron_hdpo.types.secrets import without_passwords

SECRET = "s3cr3t-value"


@pytest.fixture
def with_secrets(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> Tree:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    tree["rollout"]["sglang"] = {"servers": {"environment": {"HF_TOKEN": SECRET}, "extra_args": {"my-token": SECRET}}}
    tree["tracking"] = {"mlflow": {"uri": f"postgresql://me:{SECRET}@db:5432/runs?sslmode=require&token={SECRET}"}}
    return tree


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:pass@host:5000/x", "http://me:***@host:5000/x"),
        ("sqlite+pysqlite://:p@ss@host/db and more", "sqlite+pysqlite://:***@host/db and more"),
        ("https://host/x?a=1&api_key=abc&b=2#c", "https://host/x?a=1&api_key=***&b=2#c"),
        ("https://host/x?X-Amz-Signature=abc", "https://host/x?X-Amz-Signature=***"),
        ("https://host:5000/a@b", "https://host:5000/a@b"),
        ("sqlite:///mlflow.db", "sqlite:///mlflow.db"),
        ("a: b@c, {{ question }}?", "a: b@c, {{ question }}?"),
    ],
)
def test_passwords_of_addresses(text: str, shown: str) -> None:
    assert without_passwords(text) == shown
    assert without_passwords(shown) == shown


def test_what_is_written_has_no_secret(with_secrets: Tree, tmp_path: Path) -> None:
    recipe = parse_recipe(with_secrets)
    assert recipe.rollout.sglang.servers.environment == {"HF_TOKEN": SECRET}
    assert SECRET not in str(redacted(recipe.model_dump(mode="json")))
    save_recipe(recipe, tmp_path / "recipe.yaml")
    text = (tmp_path / "recipe.yaml").read_text()
    assert SECRET not in text
    assert "postgresql://me:***@db:5432/runs?sslmode=require&token=***" in text


def test_a_resumed_run_finds_no_difference(with_secrets: Tree, tmp_path: Path) -> None:
    save_recipe(parse_recipe(with_secrets), tmp_path / "recipe.yaml")
    assert recipe_changes(tmp_path / "recipe.yaml", parse_recipe(with_secrets)) == []
    with_secrets["rollout"]["sglang"]["servers"]["environment"] = {"HF_TOKEN": "another", "NCCL_DEBUG": "INFO"}
    assert recipe_changes(tmp_path / "recipe.yaml", parse_recipe(with_secrets)) == [
        "rollout.sglang.servers.environment.NCCL_DEBUG: None -> ***"
    ]


def test_a_saved_recipe_takes_secrets_of_servers_from_the_environment(
    with_secrets: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_recipe(parse_recipe(with_secrets), tmp_path / "recipe.yaml")
    given = ["tracking.mlflow=null", "rollout.sglang.servers.extra_args={}"]
    with pytest.raises(RecipeError) as error:
        load_recipe(tmp_path / "recipe.yaml", given)
    key = "rollout.sglang.servers.environment.HF_TOKEN"
    assert f": {key}: *** stands for a secret: set the environment variable HF_TOKEN" in str(error.value)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert load_recipe(tmp_path / "recipe.yaml", given).rollout.sglang.servers.environment == {"HF_TOKEN": SECRET}
    with pytest.raises(RecipeError) as error:
        load_recipe(tmp_path / "recipe.yaml")
    assert [line.split(": ", 1)[1] for line in str(error.value).splitlines()] == [
        f"{key}: *** stands for a secret that was not written: give the value again"
        for key in ("rollout.sglang.servers.extra_args.my-token", "tracking.mlflow.uri")
    ]


@pytest.mark.parametrize(
    "override",
    [
        f"rollout.sglang.servers.environment.HF_TOKEN=[{SECRET}]",
        f"rollout.sglang.servers.environment={SECRET}",
        f"rollout.sglang.servers.environment={{HF_TOKEN: {{a: {SECRET}}}}}",
        f"rollout.sglang.urls=['http://me:{SECRET}@host:1']",
        f"tracking.mlflow.url=http://me:{SECRET}@host",
        f"tracking.mlflow=http://me:{SECRET}@host",
    ],
)
def test_errors_show_no_secret(override: str, tree: Tree, write_recipe: Callable[[Tree], Path]) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(write_recipe(tree), [override])
    assert SECRET not in str(error.value)


def test_an_address_of_a_server_has_no_password(tree: Tree) -> None:
    sglang: dict[str, Any] = {"placement": "given", "urls": [f"http://me:{SECRET}@host:1"]}
    tree["rollout"]["sglang"] = sglang
    with pytest.raises(RecipeError, match="urls and router: a password in an address ends in logs"):
        parse_recipe(tree)
