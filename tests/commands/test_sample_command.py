"""`sample` and `chat`: answers are the model's own, of prompts, of a recipe's problems, and in a conversation."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from commands import results_of, run_command
from recipes import Tree
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_hdpo import cli
from megatron_hdpo.commands.local_model import LocalModelError, load_local_model

TEMPLATE = "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}={% else %}#{% endif %}{% endfor %}"


@pytest.fixture(scope="module")
def talking(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template."""
    path = tmp_path_factory.mktemp("talking") / "model"
    shutil.copytree(tiny_model, path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


def greedy(path: Path, prompt: str, length: int) -> str:
    """The likeliest tokens after a prompt, one by one, up to the end of the answer."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        AutoTokenizer.from_pretrained(path),
    )
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    while len(ids) < start + length and ids[-1] != tokenizer.eos_token_id:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_greedy_and_sampled_answers_to_prompts(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["sample", str(tiny_model), "1+1=", "2+", "--temperature", "0", "--max-new-tokens", "5"])
    blocks = capsys.readouterr().out.split("=== ")[1:]
    assert [block.splitlines()[0] for block in blocks] == ["1+1=", "2+"]
    for block in blocks:
        prompt, header, text = block.splitlines()
        assert text == greedy(tiny_model, prompt, 5) and header.startswith("--- sample 1: ")

    def sampled(seed: int) -> list[str]:
        cli.main(["sample", str(tiny_model), "1+1=", "-n", "6", "--max-new-tokens", "8", "--seed", str(seed)])
        return re.split(r"--- sample \d: .*\n", capsys.readouterr().out)[1:]

    first = sampled(1)
    assert len(first) == 6 and len(set(first)) > 1
    assert first == sampled(1) != sampled(2)


def test_samples_of_held_out_problems_have_rewards(tree: Tree, write_recipe: Callable[[Tree], Path]) -> None:
    ended = run_command("sample", write_recipe(tree), "seed=3", "-n", 3, "--problems", 2)
    results_of(ended)
    out = ended.stdout[0].partition("=== ")[2]
    assert [line.partition(":")[0] for line in ("=== " + out).splitlines() if line.startswith("=== ")] == [
        "=== held_out/0",
        "=== held_out/2",
    ]
    rewards = re.findall(r"^--- sample \d: reward ([\d.]+), \d+ tokens, (?:stop|length)$", out, re.MULTILINE)
    assert len(rewards) == 6 and set(rewards) <= {"0", "1"}


def test_a_chat_remembers_until_an_empty_line(
    talking: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: Iterator[str] = iter(["1+1", "2+2", "", "2+2"])

    def typed(prompt: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", typed)
    cli.main(["chat", str(talking), "--temperature", "0", "--max-new-tokens", "4"])
    said = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("(cut off")]
    first = greedy(talking, "1+1=", 4)
    again = greedy(talking, f"1+1={first}#2+2=", 4)
    assert said == [first, again, "(a new conversation)", greedy(talking, "2+2=", 4), ""]


def test_what_cannot_be_sampled_is_said(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(LocalModelError, match=r"has no config\.json: give the folder of a Hugging Face model"):
        load_local_model(str(tmp_path), "cpu", 0)
    model = load_local_model(str(tiny_model), "cpu", 0)
    with pytest.raises(LocalModelError, match="has no chat template"):
        model.chat_ids([{"role": "user", "content": "1"}])
    with pytest.raises(LocalModelError, match=r"a prompt of 128 tokens: .* takes 1 to 127"):
        model.answers([3] * 128)
    assert len(model.answers([3] * 127, temperature=1.0)[0]) == 1, "the answer ends where the context does"
