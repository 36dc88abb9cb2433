"""`megatron_hdpo verify-conversion`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_hdpo.commands.base import Command
from megatron_hdpo.commands.checkpoint_arguments import add_checkpoint, opened_layout
from megatron_hdpo.commands.numbers import integer, real

_DESCRIPTION = """\
With one folder: the checkpoint is loaded on the layout and read back. With
two: the second must be a conversion of the first. Checks that every tensor is
accounted for, that the weights are bit-equal, that the rotary tables are those
of transformers at every position of the model's context, and so are the
log-probs of texts of up to --longest tokens. Exit code 1 when a check fails.

Host memory of rank 0: the model of transformers in float32 (4 bytes per
parameter); after that its head, and 4 bytes x hidden size per token of text.
Then each rank has its part of the model in float32."""


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", type=Path, metavar="FIRST", help="Hugging Face or Megatron checkpoint folder")
    parser.add_argument(
        "second", type=Path, nargs="?", metavar="SECOND", help="checkpoint that should hold the same weights"
    )
    add_checkpoint(parser)
    # The defaults of weights.logprob_check, which this module does not import: the help needs no package.
    parser.add_argument(
        "--max-difference",
        type=real(0, 1000),
        default=1e-3,
        metavar="X",
        help="largest of log-probs (default %(default)s)",
    )
    parser.add_argument(
        "--mean-difference",
        type=real(0, 1000),
        default=1e-4,
        metavar="X",
        help="mean of log-probs (default %(default)s)",
    )
    parser.add_argument(
        "--longest",
        type=integer(1),
        default=4096,
        metavar="N",
        help="tokens of the longest text, at most the model's context (default %(default)s)",
    )
    parser.add_argument("--scratch", type=Path, metavar="FOLDER", help="folder for an export, seen by all ranks")


def _verify(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from transformers.utils.logging import disable_progress_bar

    from megatron_hdpo.weights.checks import print_checks
    from megatron_hdpo.weights.logprob_check import Tolerance
    from megatron_hdpo.weights.verify import verify

    disable_progress_bar()
    with opened_layout(arguments) as context:
        checks = verify(
            arguments.first,
            arguments.second,
            context,
            config=arguments.config,
            tolerance=Tolerance(arguments.max_difference, arguments.mean_difference),
            scratch=arguments.scratch,
            longest=arguments.longest,
        )
        if context.is_leader:
            print_checks(checks, Console())
    return 0 if all(check.passed for check in checks) else 1


COMMAND = Command(
    "verify-conversion",
    "Prove that a conversion of a checkpoint lost nothing.",
    _add,
    _verify,
    description=_DESCRIPTION,
    examples=("models/Qwen3-8B", "models/Qwen3-8B runs/qwen3-megatron"),
)
