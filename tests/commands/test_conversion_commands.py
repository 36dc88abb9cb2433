"""`convert` and `verify-conversion`: both directions, a layout of two ranks, and their exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import Ended, results_of, run_command
from tiny_checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conversion")
    make_checkpoint("llama_tied_rope3", folder / "hf")
    return folder


def test_a_converted_checkpoint_is_proven_on_another_layout(folder: Path) -> None:
    ended = run_command("convert", folder / "hf", folder / "megatron", "--to", "megatron")
    results_of(ended)
    assert ended.stdout == [f"{folder / 'megatron'}: megatron, llama, from huggingface\n"]
    ended = run_command("verify-conversion", folder / "hf", folder / "megatron", "--tensor", 2, ranks=2)
    results_of(ended)
    assert ended.stdout[0].count("passed") == 6 and "FAILED" not in ended.stdout[0] and not ended.stdout[1]


def test_a_failed_check_ends_with_1(folder: Path) -> None:
    ended = run_command("verify-conversion", folder / "hf", "--max-difference", 0, "--longest", 50)
    assert ended.codes == [1]
    assert "text 2 (50 tokens)" in ended.stdout[0] and "text 3" not in ended.stdout[0]
    assert "FAILED" in ended.stdout[0] and "text 0 (3 tokens)" in ended.stdout[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["convert", "{folder}", "{folder}/x", "--to", "huggingface"], "is neither a Hugging Face folder"),
        (["convert", "{folder}/hf", "{folder}/hf", "--to", "megatron"], "is the folder that the model came from"),
        (["verify-conversion", "{folder}/hf", "--tensor", "2"], "LayoutError: "),
    ],
)
def test_what_cannot_be_converted_is_said_in_one_line(arguments: list[str], says: str, folder: Path) -> None:
    ended: Ended = run_command(*(argument.format(folder=folder) for argument in arguments))
    assert ended.codes == [2] and says in ended.stderr[0] and ended.stderr[0].count("\n") == 1, ended.text
    assert not (folder / "x").exists()
