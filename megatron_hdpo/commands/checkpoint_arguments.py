"""Arguments of the commands that read a checkpoint on a layout of their own, without a recipe."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hdpo.commands.numbers import integer

if TYPE_CHECKING:
    from megatron_hdpo.parallel.context import ParallelContext


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the options that `opened_layout` and the readers of checkpoints need."""
    parser.add_argument("--tensor", type=integer(1), default=1, metavar="N", help="tensor-parallel ranks (default 1)")
    parser.add_argument("--pipeline", type=integer(1), default=1, metavar="N", help="pipeline stages (default 1)")
    parser.add_argument("--expert", type=integer(1), default=1, metavar="N", help="expert-parallel ranks (default 1)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="device of the model (default cpu)")
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FOLDER",
        help="Hugging Face folder with the model's config and tokenizer, for a checkpoint without them",
    )


@contextmanager
def opened_layout(arguments: argparse.Namespace) -> Iterator[ParallelContext]:
    """Yield the layout that the options ask for; its process group ends with the block unless an error leaves it."""
    from megatron_hdpo.parallel.context import start, stop
    from megatron_hdpo.parallel.layout import ParallelConfig

    layout = ParallelConfig(
        tensor=arguments.tensor,
        pipeline=arguments.pipeline,
        expert=arguments.expert,
        sequence=arguments.tensor > 1,  # Megatron needs it to combine experts with tensor parallelism
    )
    context = start(layout, device=arguments.device)
    yield context
    stop(context)
