"""`megatron_hdpo train`."""

from __future__ import annotations

import argparse
import os
import signal
import sys

from megatron_hdpo.commands.base import Command, add_recipe
from megatron_hdpo.commands.ending import USER_ERROR, another_failed, leave
from megatron_hdpo.commands.opened_run import opened_run
from megatron_hdpo.commands.report import show_report
from megatron_hdpo.parallel.stop_request import StopRequest, signals_taken

_SHOW_CURSOR = "\x1b[?25h"


def _add(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument(
        "--accept-changes", action="store_true", help="resume although problems or code of your own have changed"
    )


def _train(arguments: argparse.Namespace) -> None:
    stop = StopRequest(_end_at_once, another_failed)
    with signals_taken(stop), opened_run(arguments.recipe, arguments.overrides, True, stop) as run:
        from megatron_hdpo.training.loop import train  # here: `opened_run` says first what takes seconds to import

        run.accept_changes = arguments.accept_changes
        finished = train(run)
        folder = run.recipe.output if finished and run.context.is_leader else None
    if folder is not None:
        show_report(folder)


def _end_at_once(number: signal.Signals, has_begun: bool) -> None:
    """End this rank: with exit code 0 while there is nothing to save, else with 128 + the signal's number.

    has_begun: whether the run has begun to take steps.
    """
    if number == signal.SIGTERM and another_failed():
        leave(USER_ERROR)  # that rank has said why
    if os.environ.get("RANK", "0") == "0":
        if sys.stdout.isatty():
            print(_SHOW_CURSOR, end="", flush=True)  # progress bars hide it
        what = f"ended at once by {number.name}" if has_begun else f"ended by {number.name} before the first step"
        print(f"{what}: run the same command again to go on", file=sys.stderr, flush=True)
    leave(128 + number if has_begun else 0)


COMMAND = Command(
    "train",
    "Train, or resume the run in the output folder.",
    _add,
    _train,
    description="One rank without torchrun; more ranks: torchrun --nproc-per-node N -m megatron_hdpo train ...\n\n"
    "Ctrl-C, SIGTERM or SIGUSR1 end the run with a checkpoint; a second Ctrl-C ends it at once.",
    examples=("examples/digit_sums/hdpo.yaml", "my.yaml train.steps=10 output=runs/short"),
    interrupted="interrupted: run the same command again to resume from the last checkpoint, where there is one",
)
