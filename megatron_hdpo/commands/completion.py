"""`megatron_hdpo completion`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from megatron_hdpo.commands.base import Command, write_out

_DESCRIPTION = """\
Prints a script that completes commands, options and files. To keep it:
  bash  ~/.local/share/bash-completion/completions/megatron_hdpo
  zsh   _megatron_hdpo in a folder of $fpath, for example ~/.zfunc"""


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=["bash", "zsh"], metavar="SHELL", help="bash or zsh")


def _completion(arguments: argparse.Namespace) -> None:
    import shtab

    # The parser of the whole command line: it is built from all commands, this one too.
    whole = arguments.parser
    for action in _actions(whole):
        if action.type is Path:
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # where shtab looks for it
    write_out(f"{shtab.complete(whole, arguments.shell)}\n")


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the arguments of a parser and of its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
        else:
            yield action


COMMAND = Command(
    "completion",
    "Print a completion script for the shell.",
    _add,
    _completion,
    description=_DESCRIPTION,
    examples=("bash > ~/.local/share/bash-completion/completions/megatron_hdpo", "zsh > ~/.zfunc/_megatron_hdpo"),
)
