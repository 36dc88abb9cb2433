"""Atomic writing of a checkpoint folder by the leader, while the other ranks wait."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.types.disk import to_disk
from megatron_hdpo.weights.errors import WeightsError

_DESCRIPTION = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates",
    "*.tiktoken",
    "LICENSE*",
)
"""Files that describe a model and its tokenizer, without its weights; no other files of a source folder are copied."""


def together(context: ParallelContext, write: Callable[[], object]) -> None:
    """Run `write` on the leader and raise its failure on every rank as WeightsError, so that no rank waits forever."""
    problem = None
    if context.is_leader:
        try:
            write()
        except Exception as error:
            problem = str(error) if isinstance(error, WeightsError) else f"{type(error).__name__}: {error}"
    context.barrier("files written by rank 0")
    problem = context.broadcast_object(problem)
    if problem is not None:
        raise WeightsError(f"writing the checkpoint failed: {problem}")


def staging_of(out: Path) -> Path:
    """Return the folder beside `out` that is written first and renamed at the end."""
    return out.with_name(f".{out.name}.partial")


def prepare(out: Path, source: Path, overwrite: bool) -> None:
    """Make an empty staging folder; raises WeightsError when `out` is the source, or exists without `overwrite`."""
    if out.resolve() == source.resolve():
        raise WeightsError(f"{out} is the folder that the model came from: choose another")
    if out.exists() and not overwrite:
        raise WeightsError(f"{out} exists: remove it, choose another folder, or allow overwriting")
    shutil.rmtree(staging_of(out), ignore_errors=True)
    staging_of(out).mkdir(parents=True)


def copy_description(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Copy the config and tokenizer files of a Hugging Face folder; the copied config names `dtype`.

    Raises WeightsError when the source has no config.json.
    """
    if not (source / "config.json").is_file():
        raise WeightsError(f"{source / 'config.json'} does not exist: the config and tokenizer are copied from there")
    target.mkdir(exist_ok=True)
    for file in sorted({file for pattern in _DESCRIPTION for file in source.glob(pattern)}):
        copy = shutil.copytree if file.is_dir() else shutil.copyfile
        copy(file, target / file.name)
    config = json.loads((target / "config.json").read_text())
    # transformers 4 writes torch_dtype, 5 writes dtype; 5 reads both, 4 only the first.
    key = "dtype" if "dtype" in config else "torch_dtype"
    config[key] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def publish(out: Path) -> None:
    """Rename the staging folder to `out`, in place of an older one."""
    staging = staging_of(out)
    for file in staging.rglob("*"):
        to_disk(file)
    replaced = out.with_name(f".{out.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if out.exists():
        out.rename(replaced)
    staging.rename(out)
    shutil.rmtree(replaced, ignore_errors=True)
