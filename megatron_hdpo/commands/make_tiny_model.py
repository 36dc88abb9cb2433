"""`megatron_hdpo make-tiny-model`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_hdpo.commands.base import Command
from megatron_hdpo.commands.numbers import integer

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")
_SIZES = {
    "layers": (4, "transformer layers"),
    "hidden": (96, "hidden size"),
    "heads": (4, "attention heads"),
    "kv-heads": (4, "key-value heads"),
    "ffn": (256, "channels of the feed-forward layers, or of one expert"),
    "experts": (8, "experts of qwen3_moe"),
    "experts-per-token": (2, "experts per token of qwen3_moe"),
    "seed": (0, "seed of the weights"),
}


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--family", choices=FAMILIES, default="llama", help="architecture (default llama)")
    for name, (default, meaning) in _SIZES.items():
        kind = integer(0) if name == "seed" else integer(1, 2**16)
        parser.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=f"{meaning} (default {default})")


def _make(arguments: argparse.Namespace) -> None:
    from transformers.utils.logging import disable_progress_bar

    from megatron_hdpo.model.tiny_model import make_tiny_model

    disable_progress_bar()
    _check(arguments)
    sizes = {key.replace("-", "_"): getattr(arguments, key.replace("-", "_")) for key in _SIZES}
    print(make_tiny_model(arguments.out, family=arguments.family, **sizes))


def _check(arguments: argparse.Namespace) -> None:
    """Raise UserError for sizes that no architecture has."""
    from megatron_hdpo.model.config import ModelError

    for part, whole in (("heads", "hidden"), ("kv_heads", "heads")):
        if getattr(arguments, whole) % getattr(arguments, part):
            names = f"--{part.replace('_', '-')} {getattr(arguments, part)}", f"--{whole} {getattr(arguments, whole)}"
            raise ModelError(f"{names[0]} does not divide {names[1]}")
    if arguments.experts_per_token > arguments.experts:
        raise ModelError(f"--experts-per-token {arguments.experts_per_token} is above --experts {arguments.experts}")


COMMAND = Command(
    "make-tiny-model",
    "Make a tiny random model for a first run.",
    _add,
    _make,
    description="A Hugging Face folder with a tokenizer of one token per character: digits, +, = and #.",
    examples=("runs/tiny-model", "runs/tiny-experts --family qwen3_moe"),
)
