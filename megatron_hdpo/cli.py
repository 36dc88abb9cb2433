"""The command line of megatron_hdpo: parses the arguments, runs the command, and says an error of the user once."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from megatron_hdpo import commands
from megatron_hdpo.commands.base import PROGRAM, Command
from megatron_hdpo.commands.ending import USER_ERROR, another_failed, end_with, first_to_fail, leave
from megatron_hdpo.environment import broken_package, missing_package, versions
from megatron_hdpo.parallel.stop_request import end_with_agent
from megatron_hdpo.types.errors import UserError

INTERRUPTED = 130
_DESCRIPTION = """\
Reinforcement learning with privileged self-distillation on Megatron-Core.

Commands that run a recipe take its YAML file and KEY.PATH=VALUE overrides;
torchrun starts more than one rank."""
_EPILOG = """\
`megatron_hdpo COMMAND --help` describes a command and its arguments.

exit codes:
  0    the command did its work; or a run was asked to end, and has saved
  1    a check failed (doctor, verify-checkpoint, verify-conversion), or
       a defect of megatron_hdpo, which prints a traceback
  2    an error that you can fix, said in one line; wrong usage too
  130  interrupted (Ctrl-C)"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; for an error that the user can fix, print one message and exit with code 2."""
    end_with_agent()
    arguments = _parsed(argv)
    command: Command = arguments.command
    try:
        code = command.run(arguments)
    except KeyboardInterrupt:
        if first_to_fail():
            print(command.interrupted, file=sys.stderr, flush=True)
        leave(INTERRUPTED)
    except Exception as error:
        if (message := _for_the_user(error)) is not None:
            end_with(message)
        if not another_failed():
            first_to_fail()  # the other ranks end because of this one
            raise
        logging.getLogger(__name__).info("ended because another rank did", exc_info=True)
        leave(USER_ERROR)
    if code:
        sys.exit(code)


def _for_the_user(error: Exception) -> str | None:
    """Return the one line to print for an error that the user can fix; None for a bug of this package."""
    if (line := missing_package(error) or broken_package(error)) is not None:
        return line
    return f"{type(error).__name__}: {error}" if isinstance(error, UserError) else None


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed arguments; overrides may stand behind options, where argparse takes no positional arguments."""
    arguments, others = parser().parse_known_args(argv)
    if others:
        if not hasattr(arguments, "overrides") or any(other.startswith("-") for other in others):
            arguments.own_parser.error(f"unrecognized arguments: {' '.join(others)}")
        arguments.overrides += others
    return arguments


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    whole = argparse.ArgumentParser(
        prog=PROGRAM, description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    whole.add_argument("--version", action=_Version, help="print the versions of megatron_hdpo and its main packages")
    subparsers = whole.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for command in commands.ALL:
        own = subparsers.add_parser(
            command.name,
            help=command.summary,
            description=command.help,
            epilog=command.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add(own)
        own.set_defaults(command=command, parser=whole, own_parser=own)
    return whole


class _Version(argparse.Action):
    """Option that prints the versions, which are looked up only then, and ends."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print("\n".join(versions()))
        parser.exit()
