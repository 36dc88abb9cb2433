"""`megatron_hdpo convert`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_hdpo.commands.base import Command
from megatron_hdpo.commands.checkpoint_arguments import add_checkpoint, opened_layout

_DESCRIPTION = """\
A Megatron checkpoint (format torch_dist) stores every tensor under its global
shape, so a run at any tensor, pipeline or expert parallelism can read it, and
one rank alone can convert every model that fits its memory. Start larger
models with torchrun: --tensor x --pipeline ranks share the model, and each
reads and writes its part. Checkpoints of training runs are read too (their
weights; name the folder of their model with --config)."""


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE", help="Hugging Face or Megatron checkpoint folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--to", choices=["huggingface", "megatron"], required=True, help="format to write")
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="precision (default auto: as stored)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    add_checkpoint(parser)


def _convert(arguments: argparse.Namespace) -> None:
    from megatron_hdpo.weights.convert import convert

    with opened_layout(arguments) as context:
        read = convert(
            arguments.source,
            arguments.out,
            arguments.to,
            context,
            dtype=arguments.dtype,
            config=arguments.config,
            overwrite=arguments.overwrite,
        )
        if context.is_leader:
            print(f"{arguments.out}: {arguments.to}, {read.architecture.family}, from {read.format}")


COMMAND = Command(
    "convert",
    "Convert a checkpoint between Hugging Face and Megatron.",
    _add,
    _convert,
    description=_DESCRIPTION,
    examples=(
        "models/Qwen3-8B runs/qwen3-megatron --to megatron",
        "runs/my-run/checkpoints/step_00000100 runs/hf --to huggingface --config models/Qwen3-8B",
    ),
)
