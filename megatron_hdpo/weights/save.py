"""A Megatron model as a Hugging Face folder, written shard by shard."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.weights.errors import WeightsError
from megatron_hdpo.weights.hf_files import INDEX_FILE, SINGLE_FILE
from megatron_hdpo.weights.stream import Bucket, WeightGatherer

_COPIED = (
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
"""What describes the model and its tokenizer, not its weights; the rest of the source folder stays behind."""


def save_hf(
    model: nn.Module,
    architecture: Architecture,
    context: ParallelContext,
    source_path: str | Path,
    out_path: str | Path,
    dtype: torch.dtype | None = None,
    *,
    max_shard_bytes: int = 4 * 2**30,
    overwrite: bool = False,
) -> None:
    """Write `out_path`: safetensors, and config and tokenizer files from `source_path`. `transformers` loads it.

    Collective over all ranks; the first replica's leader writes. It holds one shard of at most `max_shard_bytes` in
    host memory. dtype: type of the stored weights (default: the model's); the config names it. Atomic: the folder
    appears complete or not at all; an existing one is replaced only with `overwrite`.
    Raises WeightsError, on every rank, when the folder exists or cannot be written.
    """
    out = Path(out_path)
    staging = out.with_name(f".{out.name}.partial")
    dtype = dtype or next(model.parameters()).dtype
    _together(context, lambda: _prepare(Path(source_path), out, staging, dtype, overwrite))
    gatherer = WeightGatherer(model, architecture, context, to="leader", bucket_bytes=min(2**26, max_shard_bytes))
    shards = _plan(gatherer.buckets, max_shard_bytes // dtype.itemsize)
    held: dict[str, Tensor] = {}
    files: dict[str, str] = {}
    for number, buckets in enumerate(shards, start=1):
        file = _shard_name(number, len(shards))
        held.clear()
        if context.dp_rank == 0:
            for name, value in chain.from_iterable(map(gatherer.gather, buckets)):
                held[name] = value.to(device="cpu", dtype=dtype)
                files[name] = file
        _together(context, partial(save_file, held, staging / file, metadata={"format": "pt"}))
    num_bytes = dtype.itemsize * sum(bucket.numel for bucket in gatherer.buckets)
    _together(context, lambda: _finish(staging, out, files, num_bytes))


def _together(context: ParallelContext, write: Callable[[], None]) -> None:
    """Run `write` on the leader; its failure is raised on every rank, so that none waits for a rank that gave up."""
    problem = None
    if context.is_leader:
        try:
            write()
        except Exception as error:
            problem = str(error) if isinstance(error, WeightsError) else f"{type(error).__name__}: {error}"
    problem = context.broadcast_object(problem)
    if problem is not None:
        raise WeightsError(f"saving the Hugging Face folder failed: {problem}")


def _prepare(source: Path, out: Path, staging: Path, dtype: torch.dtype, overwrite: bool) -> None:
    if out.resolve() == source.resolve():
        raise WeightsError(f"{out} is the folder that the model came from: choose another")
    if out.exists() and not overwrite:
        raise WeightsError(f"{out} exists: remove it, choose another folder, or allow overwriting")
    if not (source / "config.json").is_file():
        raise WeightsError(f"{source / 'config.json'} does not exist: the config and tokenizer are copied from there")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    for file in sorted({file for pattern in _COPIED for file in source.glob(pattern)}):
        copy = shutil.copytree if file.is_dir() else shutil.copyfile
        copy(file, staging / file.name)
    config = json.loads((staging / "config.json").read_text())
    # transformers 4 wrote torch_dtype, 5 writes dtype; 5 reads either, 4 only the first.
    key = "dtype" if "dtype" in config else "torch_dtype"
    config[key] = str(dtype).removeprefix("torch.")
    (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _plan(buckets: list[Bucket], limit: int) -> list[list[Bucket]]:
    """Buckets per file, in stream order; a file has at most `limit` elements, or one bucket that has more."""
    shards: list[list[Bucket]] = []
    size = limit
    for bucket in buckets:
        if size + bucket.numel > limit:
            shards.append([])
            size = 0
        shards[-1].append(bucket)
        size += bucket.numel
    return shards


def _shard_name(number: int, count: int) -> str:
    return SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _finish(staging: Path, out: Path, files: dict[str, str], num_bytes: int) -> None:
    if len(set(files.values())) > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": files}
        (staging / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    for file in staging.iterdir():
        _to_disk(file)
    replaced = out.with_name(f".{out.name}.replaced")
    if out.exists():
        shutil.rmtree(replaced, ignore_errors=True)
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
