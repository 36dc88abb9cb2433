"""`init` and `make-tiny-model`: what a user without the repository starts from."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from recipes import ROOT
from transformers import AutoConfig, AutoTokenizer

from megatron_hdpo import cli
from megatron_hdpo.commands.init import InitError, copy_recipe, shipped
from megatron_hdpo.commands.make_tiny_model import FAMILIES
from megatron_hdpo.config import load_recipe
from megatron_hdpo.model import tiny_model

NAMED = re.compile(r"[\w./-]+\.(?:yaml|sh|sbatch)")


def test_init_alone_lists_every_recipe_with_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    cli.main(["init"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped()) and len(lines) >= 20
    assert all(len(line) <= 80 and len(line.split()) > 3 for line in lines)


@pytest.mark.parametrize("name", shipped())
def test_a_copy_is_the_recipe_and_all_that_its_comment_names(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    recipe, *others = copy_recipe(name, folder)
    assert load_recipe(recipe) == load_recipe(shipped()[name])
    for path in [recipe, *(path for path in others if path.suffix == ".yaml")]:
        text = path.read_text()
        assert "examples/" not in text and "../" not in text
        commands = [line for line in text.splitlines() if line.startswith("#   ")]
        named = [found for line in commands for found in NAMED.findall(line)]
        assert str(path) in named and all(Path(found).is_file() for found in named)
    assert (folder / "recipe.schema.json").read_text() == (ROOT / "docs" / "recipe.schema.json").read_text()


def test_a_folder_of_one_recipe_is_its_name_and_launch_scripts_come_along(tmp_path: Path) -> None:
    recipe, *others = copy_recipe("qwen2.5-7b", tmp_path)
    assert recipe == tmp_path / "qwen2.5-7b-hdpo.yaml"
    scripts = [path for path in others if path.parent == tmp_path / "cluster"]
    assert {path.name for path in scripts} == {path.name for path in (ROOT / "examples" / "cluster").iterdir()}
    assert os.access(tmp_path / "cluster" / "one_node.sh", os.X_OK)
    for script in scripts:
        assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
        assert "examples/" not in script.read_text()


def test_init_overwrites_nothing_and_knows_no_other_name(tmp_path: Path) -> None:
    recipe, *_ = copy_recipe("digit_sums", tmp_path)
    recipe.write_text("mine\n")
    with pytest.raises(InitError, match=r"digit_sums-hdpo\.yaml exists already: remove it, or give another folder"):
        copy_recipe("digit_sums", tmp_path)
    assert recipe.read_text() == "mine\n"
    with pytest.raises(InitError, match=r"methods: is not the name of a recipe; choose one of methods/akl, "):
        copy_recipe("methods", tmp_path)
    assert copy_recipe("opd", tmp_path)[0].name == "methods-opd.yaml"
    with pytest.raises(
        InitError, match=r"hdpo: is not the name of a recipe; choose one of digit_sums/hdpo, methods/hdpo"
    ):
        copy_recipe("hdpo", tmp_path)
    with pytest.raises(InitError, match=r"fly: .* choose one of digit_sums/hdpo, "):
        copy_recipe("fly", tmp_path)


def test_make_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tuple(tiny_model.FAMILIES) == FAMILIES
    cli.main(["make-tiny-model", str(tmp_path / "model"), "--family", "qwen3", "--layers", "1", "--kv-heads", "2"])
    assert capsys.readouterr().out.endswith(f"{tmp_path / 'model'}\n")
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert (config.model_type, config.num_hidden_layers, config.num_key_value_heads) == ("qwen3", 1, 2)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "model").encode("1+1=2#")) == 6
