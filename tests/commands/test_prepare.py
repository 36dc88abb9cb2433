"""`megatron_hdpo prepare`: from a hub on this machine to a recipe that runs without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import COMMIT, hub

from megatron_hdpo import cli

ROWS = [{"problem": f"{i}+{j}=", "answer": str(i + j), "solution": str(i + j)} for i in range(9) for j in range(9)]


@pytest.fixture
def recipe(tree, tmp_path, write_recipe) -> Path:
    """A recipe that reads rows, one of them too long, for training and for its warm-up."""
    rows = [*ROWS, {"problem": "+".join("1" * 20) + "=", "answer": "20"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:30]))
    tree["data"]["train"] = [{"kind": "jsonl", "path": str(tmp_path / "rows.jsonl")}]
    # A worked solution gets a box around its answer, for which the tiny model's tokenizer has no tokens.
    tree["data"]["prompts"] |= {"privileged": "{{ answer }}#{{ question }}", "privileged_context": "answer"}
    tree["data"]["cache_dir"] = str(tmp_path / "cache")
    tree["warmup"] = {"kind": "sft", "plain": [{"kind": "jsonl", "path": str(tmp_path / "more.jsonl")}]}
    return write_recipe(tree)


def command(*argv: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in an interpreter of its own: Hugging Face reads its variables at import."""
    line = [sys.executable, "-m", "megatron_hdpo", *map(str, argv)]
    return subprocess.run(line, capture_output=True, text=True, env=os.environ | environment)


def test_a_prepared_recipe_asks_no_network(recipe, tiny_model, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:20]))
    with hub({"org/tiny": tiny_model, "datasets/org/set": tmp_path / "set"}) as (url, asked):
        held_out = "data.evaluation=[{kind: huggingface, dataset: org/set, split: 'train[50%:]', name: held_out}]"
        hubbed = [recipe, "model.path=org/tiny", "data.decontaminate=false", held_out]
        environment = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": url}
        prepared = command("prepare", *hubbed, **environment)
        assert prepared.returncode == 0, prepared.stderr
        downloaded = len(asked)
        again = command("prepare", *hubbed, **environment, HF_HUB_OFFLINE="1")
        assert again.returncode == 0, again.stderr
        assert len(asked) == downloaded > 0
    assert again.stdout == prepared.stdout.replace("checked and cached in", "read from the cache")
    lines = prepared.stdout.splitlines()
    assert lines[0].startswith(f"model.path: org/tiny, revision {COMMIT[:12]}: ")
    assert f"in {tmp_path / 'hf'}" in lines[0]
    assert {"rows: 81 problems", "held_out: 10 problems", "warmup.plain:", "more: 30 problems"} <= set(lines)
    assert any(line.startswith("rows: 1 left out, prompt too long") for line in lines)
    assert f"all by: rm -r {tmp_path / 'cache' / 'problems'}" in prepared.stdout


def test_a_second_time_does_nothing_again(recipe, capsys):
    cli.main(["prepare", str(recipe)])
    first = capsys.readouterr().out
    cli.main(["prepare", str(recipe)])
    second = capsys.readouterr().out
    assert "is a folder: nothing to download" in first
    assert (first.count("checked and cached in"), first.count("read from the cache")) == (2, 0)
    assert (second.count("checked and cached in"), second.count("read from the cache")) == (0, 2)
    assert second.replace("read from the cache", "checked and cached in") == first


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        (
            "prepare",
            "/no/such/model",
            "RecipeError: model.path: /no/such/model is neither a folder nor a name on the hub",
        ),
        ("prepare", "org/tiny", "HubError: org/tiny cannot be downloaded: "),
        (
            "check",
            "org/tiny",
            "ArchitectureError: org/tiny/config.json does not exist: model.path must be a Hugging "
            "Face checkpoint folder, or a model of the hub that `megatron_hdpo prepare` has downloaded",
        ),
    ],
)
def test_a_model_that_cannot_be_had_is_one_line(recipe, monkeypatch, name, path, message):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(Exception) as raised:
        arguments = cli.parser().parse_args([name, str(recipe), f"model.path={path}"])
        arguments.command.run(arguments)
    text = f"{type(raised.value).__name__}: {raised.value}"
    assert text.startswith(message)
    assert "\n" not in text
