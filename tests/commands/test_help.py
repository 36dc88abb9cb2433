"""The help: one style for all commands, the versions, the exit codes."""

from __future__ import annotations

import argparse
import importlib.metadata
import shlex
import signal
import subprocess
import sys

import pytest
from commands import run_world
from recipes import ROOT

from megatron_hdpo import cli, commands, config
from megatron_hdpo.commands.base import Command

ALL = pytest.mark.parametrize("command", commands.ALL, ids=lambda command: command.name)
NOT_IMPERATIVE = ("the", "a", "an", "this", "what", "how", "shows", "prints", "makes", "runs")


def _parser(command: Command) -> argparse.ArgumentParser:
    (subparsers,) = (a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    return subparsers.choices[command.name]


@ALL
def test_a_summary_is_one_imperative_sentence_that_fits_a_line(command: Command) -> None:
    first = command.summary.split()[0]
    assert first[0].isupper() and first.lower() not in NOT_IMPERATIVE and not first.endswith("ing")
    assert command.summary.endswith(".") and ". " not in command.summary
    assert len(command.summary) <= 57, "80 columns, less those of the names"


@ALL
def test_help_explains_every_argument_and_ends_with_examples(command: Command) -> None:
    parser = _parser(command)
    assert [action.dest for action in parser._actions if not action.help] == []
    shown = [action.metavar for action in parser._actions if not action.option_strings and action.choices is None]
    assert all(metavar and metavar.upper() == metavar for metavar in shown)
    text = parser.format_help()
    assert command.summary in text and "\nexamples:\n  megatron_hdpo " + command.name in text
    assert max(map(len, command.description.splitlines()), default=0) <= 100


@ALL
def test_the_examples_of_a_command_parse(command: Command) -> None:
    for example in command.examples:
        assert cli.parser().parse_args([command.name, *shlex.split(example.partition(" > ")[0])]).command is command


def test_help_names_every_command_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["--help"])
    assert exit.value.code == 0
    said = capsys.readouterr().out
    assert all(f"    {command.name} " in said or f"    {command.name}\n" in said for command in commands.ALL)
    codes = said.partition("exit codes:\n")[2]
    assert [int(line.split()[0]) for line in codes.splitlines() if line.split()[0].isdigit()] == [0, 1, 2, 130]


def test_overrides_behind_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = cli._parsed(["check", "my.yaml", "a.b=1", "--for", "gpu", "c=2"])
    assert (arguments.recipe.name, arguments.overrides, arguments.machine) == ("my.yaml", ["a.b=1", "c=2"], "gpu")
    for wrong in (["check", "my.yaml", "--fly", "c=2"], ["report", "runs/a", "--out", "b", "--fly"]):
        with pytest.raises(SystemExit) as exit:
            cli._parsed(wrong)
        assert exit.value.code == 2
        said = capsys.readouterr().err
        assert f"usage: megatron_hdpo {wrong[0]} " in said and "unrecognized arguments: --fly" in said


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = f"{shlex.quote(sys.executable)} -m megatron_hdpo explain --json-schema | head -1; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert (ended.returncode, ended.stderr) == (0, "") and len(ended.stdout.splitlines()) == 1


def test_versions_are_those_that_pip_installed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert exit.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("megatron_hdpo 0.")
    assert {f"{name} {importlib.metadata.version(name)}" for name in ("torch", "megatron-core")} <= set(lines)


@pytest.mark.parametrize("arguments", [[], ["fly"], ["train"], ["report"], ["convert", "a", "b"]])
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2
    assert "usage: megatron_hdpo" in capsys.readouterr().err


def test_an_interrupted_command_says_so_in_one_line_and_ends_with_130() -> None:
    ended = run_world(1, _interrupted_at_the_recipe)
    assert ended.codes == [130]
    assert ended.stderr == [
        "interrupted: run the same command again to resume from the last checkpoint, where there is one\n"
    ]


def _interrupted_at_the_recipe() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.load_recipe = lambda *_: signal.raise_signal(signal.SIGINT)
    cli.main(["train", "recipe.yaml"])
