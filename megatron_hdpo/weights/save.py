"""Export of a Megatron model to a Hugging Face folder, shard by shard."""

from __future__ import annotations

import json
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.types.disk import give_user_mode
from megatron_hdpo.weights.folder import copy_description, prepare, publish, staging_of, together
from megatron_hdpo.weights.hf_files import INDEX_FILE, SINGLE_FILE
from megatron_hdpo.weights.stream import WeightBucket, WeightGatherer


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
    """Write `out_path`: safetensors, with the config and tokenizer files of `source_path`; `transformers` can load it.

    Collective over all ranks; rank 0 writes. It holds one shard of at most `max_shard_bytes` in host memory. dtype:
    type of the stored weights (default: the model's); the config names it. Atomic: the folder appears complete or not
    at all; an existing one is replaced only with `overwrite`.
    Raises WeightsError, on every rank, when the folder exists or cannot be written.
    """
    source, out = Path(source_path), Path(out_path)
    dtype = dtype or next(model.parameters()).dtype
    together(context, partial(prepare, out, source, overwrite))
    together(context, partial(copy_description, source, staging_of(out), dtype))
    gatherer = WeightGatherer(model, architecture, context, to="first", bucket_bytes=min(2**25, max_shard_bytes))
    shards = _plan(gatherer.buckets, max_shard_bytes // dtype.itemsize)
    held: dict[str, Tensor] = {}
    files: dict[str, str] = {}
    for number, buckets in enumerate(shards, start=1):
        file = _shard_name(number, len(shards))
        held.clear()
        for name, value in chain.from_iterable(map(gatherer.gather, buckets)):
            held[name] = value.to(device="cpu", dtype=dtype)
            files[name] = file
        together(context, partial(_write, held, staging_of(out) / file))
    num_bytes = dtype.itemsize * sum(bucket.numel for bucket in gatherer.buckets)
    together(context, partial(_finish, out, files, num_bytes))


def _write(tensors: dict[str, Tensor], file: Path) -> None:
    save_file(tensors, file, metadata={"format": "pt"})
    give_user_mode(file)


def _plan(buckets: list[WeightBucket], limit: int) -> list[list[WeightBucket]]:
    """Distribute buckets over files, in stream order, at most `limit` elements or one larger bucket per file."""
    shards: list[list[WeightBucket]] = []
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


def _finish(out: Path, files: dict[str, str], num_bytes: int) -> None:
    if len(set(files.values())) > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": files}
        (staging_of(out) / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    publish(out)
