"""A checkpoint folder that appears complete or not at all, written by the leader while the other ranks wait."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_hdpo.parallel.context import ParallelContext
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
"""What describes a model and its tokenizer, not its weights; the rest of a source folder stays behind."""


def together(context: ParallelContext, write: Callable[[], object]) -> None:
    """Run `write` on the leader; its failure is raised on every rank, so that none waits for a rank that gave up."""
    problem = None
    if context.is_leader:
        try:
            write()
        except Exception as error:
            problem = str(error) if isinstance(error, WeightsError) else f"{type(error).__name__}: {error}"
    problem = context.broadcast_object(problem)
    if problem is not None:
        raise WeightsError(f"writing the checkpoint failed: {problem}")


def staging_of(out: Path) -> Path:
    """The folder beside `out` that is written first and renamed at the end."""
    return out.with_name(f".{out.name}.partial")


def prepare(out: Path, source: Path, overwrite: bool) -> None:
    """Make an empty staging folder. Raises WeightsError when `out` exists (or is the source) and must not go."""
    if out.resolve() == source.resolve():
        raise WeightsError(f"{out} is the folder that the model came from: choose another")
    if out.exists() and not overwrite:
        raise WeightsError(f"{out} exists: remove it, choose another folder, or allow overwriting")
    shutil.rmtree(staging_of(out), ignore_errors=True)
    staging_of(out).mkdir(parents=True)


def copy_description(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Copy config and tokenizer files of a Hugging Face folder; the copied config names `dtype`."""
    if not (source / "config.json").is_file():
        raise WeightsError(f"{source / 'config.json'} does not exist: the config and tokenizer are copied from there")
    target.mkdir(exist_ok=True)
    for file in sorted({file for pattern in _DESCRIPTION for file in source.glob(pattern)}):
        copy = shutil.copytree if file.is_dir() else shutil.copyfile
        copy(file, target / file.name)
    config = json.loads((target / "config.json").read_text())
    # transformers 4 wrote torch_dtype, 5 writes dtype; 5 reads either, 4 only the first.
    key = "dtype" if "dtype" in config else "torch_dtype"
    config[key] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def publish(out: Path) -> None:
    """Give the staging folder its name, in place of an older one."""
    staging = staging_of(out)
    for file in staging.rglob("*"):
        _to_disk(file)
    replaced = out.with_name(f".{out.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if out.exists():
        out.rename(replaced)
    staging.rename(out)
    shutil.rmtree(replaced, ignore_errors=True)


def _to_disk(path: Path) -> None:
    """Bytes must be on the disk before the rename is, or a power cut leaves a complete-looking folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
