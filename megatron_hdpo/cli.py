"""The command line of megatron_hdpo: parses the arguments, runs the command, and says an error of the user once."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_hdpo import commands
from megatron_hdpo.commands.base import PROGRAM, Command
from megatron_hdpo.environment import broken_package, missing_package, versions
from megatron_hdpo.types.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import Store

USER_ERROR = 2
INTERRUPTED = 130
_DESCRIPTION = """\
Reinforcement learning with privileged self-distillation on Megatron-Core.

Commands that run a recipe take its YAML file and KEY.PATH=VALUE overrides;
torchrun starts more than one rank."""
_EPILOG = """\
`megatron_hdpo COMMAND --help` describes a command and its arguments.

exit codes:
  0    the command did its work
  1    a check failed (doctor, verify-conversion), or a defect of
       megatron_hdpo, which prints a traceback
  2    an error that you can fix, said in one line; wrong usage too
  130  interrupted (Ctrl-C)"""
_FAILED = "megatron_hdpo/failed"


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; for an error that the user can fix, print one message and exit with code 2."""
    arguments = _parsed(argv)
    command: Command = arguments.command
    try:
        code = command.run(arguments)
    except KeyboardInterrupt:
        if _first_to_fail():
            print(command.interrupted, file=sys.stderr, flush=True)
        _leave(INTERRUPTED)
    except Exception as error:
        if (message := _for_the_user(error)) is not None:
            if _first_to_fail():
                print(message, file=sys.stderr, flush=True)
            _leave(USER_ERROR)
        if not _another_failed():
            raise
        logging.getLogger(__name__).info("ended because another rank did", exc_info=True)
        _leave(USER_ERROR)
    if code:
        sys.exit(code)


def _for_the_user(error: Exception) -> str | None:
    """Return the one line to print for an error that the user can fix; None for a bug of this package."""
    if (line := missing_package(error) or broken_package(error)) is not None:
        return line
    return f"{type(error).__name__}: {error}" if isinstance(error, UserError) else None


def _leave(code: int) -> NoReturn:
    """End the process at once, with its child processes.

    Other ranks may wait in a collective, and a normal exit would wait for them. Megatron's checkpoints keep a child
    process that would hold our output open for a while, so children are killed as a normal exit would do.
    """
    sys.stdout.flush()
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def _first_to_fail() -> bool:
    """Return whether this rank prints the message: an error on every rank is printed once, one on rank 3 alone too.

    Ranks count themselves in torchrun's own store, which exists before any process group, or in that of rank 0; without
    a store, the first rank of each node prints.
    """
    try:
        if (store := _agent_store()) is not None:
            return store.add(_FAILED, 1) == 1
    except RuntimeError:  # rank 0 has ended meanwhile, and the store with it
        pass
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return True
    time.sleep(5)  # torchrun ends all ranks of a node when one has ended: let the first one speak before that
    return False


def _another_failed() -> bool:
    """Return whether another rank has already ended with its own message; a failure here only follows from it."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return False
    store = _agent_store()
    if store is None:  # where rank 0 keeps the store, it is gone with rank 0
        return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "False" and os.environ.get("RANK") != "0"
    time.sleep(0.5)  # a connection may break a moment before the rank at its other end has counted itself
    try:
        return bool(store.check([_FAILED]))
    except RuntimeError:
        return True


def _agent_store() -> Store | None:
    """Return torchrun's store, or rank 0's where agents do not share theirs (rank 0's is new after each restart)."""
    if "TORCHELASTIC_USE_AGENT_STORE" not in os.environ:
        return None
    from torch.distributed import PrefixStore, TCPStore, is_initialized

    of_agents = os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True"
    if not of_agents and not is_initialized():
        return None
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        patience = timedelta(seconds=10 if of_agents else 2)
        store = TCPStore(address, port, is_master=False, timeout=patience, wait_for_workers=False)
        return PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if of_agents else "0", store)
    except (KeyError, ValueError, RuntimeError):
        return None


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
