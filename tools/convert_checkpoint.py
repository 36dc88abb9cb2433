"""Convert a checkpoint between Hugging Face safetensors and Megatron's distributed format, at any TP x PP layout.

python tools/convert_checkpoint.py HF_FOLDER OUT --to megatron
python tools/convert_checkpoint.py MEGATRON_FOLDER OUT --to huggingface
torchrun --standalone --nproc-per-node 4 tools/convert_checkpoint.py HF_FOLDER OUT --to megatron --tensor 2 --pipeline 2
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import _environment  # noqa: F401
from rich.console import Console

from megatron_hdpo.model.architecture import ArchitectureError
from megatron_hdpo.parallel.context import start, stop
from megatron_hdpo.parallel.layout import LayoutError, ParallelConfig
from megatron_hdpo.weights.convert import convert
from megatron_hdpo.weights.errors import WeightsError

_EPILOG = """
A Megatron checkpoint in this format (torch_dist) has no layout: it stores every tensor under its global shape, and a
run at any TP x PP reads what it needs. So one rank alone converts for any target, if the model fits its memory. Under
torchrun, --tensor x --pipeline ranks share the model, each reading and writing its own part: for large models, and to
try a layout. Checkpoints of training runs are read too (their weights; name the model's folder with --config).
"""


def main() -> int:
    """Convert the checkpoint; return 0 when it is written, 2 with one message when it cannot be."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="Hugging Face or Megatron checkpoint folder")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--to", choices=["huggingface", "megatron"], required=True, help="format to write")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks (TP)")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline stages (PP)")
    parser.add_argument("--expert", type=int, default=1, help="expert-parallel ranks (EP)")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: as stored")
    parser.add_argument(
        "--config", type=Path, help="Hugging Face folder with config and tokenizer, where source has none"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="device that holds the shards")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    arguments = parser.parse_args()
    try:
        layout = ParallelConfig(
            tensor=arguments.tensor,
            pipeline=arguments.pipeline,
            expert=arguments.expert,
            sequence=arguments.tensor > 1,  # Megatron needs it to combine experts with tensor parallelism
        )
        context = start(layout, device=arguments.device)
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
            Console().print(f"{arguments.out}: {arguments.to}, {read.architecture.family}, from {read.format}")
    except (WeightsError, ArchitectureError, LayoutError) as error:
        if os.environ.get("RANK", "0") == "0":
            Console(stderr=True).print(str(error), markup=False, style="red", soft_wrap=True)
        return 2
    finally:
        stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
