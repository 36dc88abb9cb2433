"""Megatron's distributed checkpoints (torch_dist): weights of a model in a folder that does not depend on a layout.

A tensor is stored with its global shape and the offset of every piece; a run at any TP x PP reads what it needs.
`model.json` in the same folder describes the architecture, `hugging_face/` holds the config and tokenizer files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import nn

from megatron_hdpo.model.architecture import Architecture, ArchitectureError
from megatron_hdpo.model.chunks import unwrap
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.weights.errors import WeightsError, listed
from megatron_hdpo.weights.folder import copy_description, prepare, publish, staging_of, together
from megatron_hdpo.weights.load import zero_padding
from megatron_hdpo.weights.sharded_writer import write_sharded
from megatron_hdpo.weights.stored import read_sharded, read_tensors

DESCRIPTION = "hugging_face"
_RECORD = "model.json"
_TRAINING_RECORD = "run_state.json"  # the description in a checkpoint of a training run
_MARKER = "metadata.json"  # Megatron's own, written last
_VERSION = 1
_NOT_WEIGHTS = re.compile(r"(chained_\d+\.)?optimizer\.")
"""Start of the optimizer's keys in a training checkpoint; experts and chunks have numbered optimizers of their own."""


def is_megatron_checkpoint(path: Path) -> bool:
    """Return whether a folder holds a complete distributed checkpoint."""
    return (path / _MARKER).is_file()


def read_record(path: Path) -> Architecture:
    """Read the architecture of a Megatron checkpoint; raises WeightsError when it is missing or not known."""
    record = next((path / name for name in (_RECORD, _TRAINING_RECORD) if (path / name).is_file()), None)
    if record is None:
        raise WeightsError(f"{path} has neither {_RECORD} nor {_TRAINING_RECORD}: its architecture is unknown")
    try:
        return Architecture(**json.loads(record.read_text())["architecture"])
    except (ValueError, TypeError, KeyError, ArchitectureError) as error:
        raise WeightsError(f"{record} does not describe an architecture of this version: {error}") from error


def stored_dtype(path: Path) -> torch.dtype:
    """Return the type of the stored weights."""
    return read_tensors(path)["embedding.word_embeddings.weight"].dtype


def save_megatron(
    model: nn.Module,
    architecture: Architecture,
    context: ParallelContext,
    source_path: str | Path,
    out_path: str | Path,
    *,
    overwrite: bool = False,
) -> None:
    """Write the model's weights as a distributed checkpoint, each rank its own shard; config from `source_path`.

    Collective over all ranks. Atomic like `save_hf`, with the same errors.
    """
    source, out = Path(source_path), Path(out_path)
    dtype = next(model.parameters()).dtype
    together(context, partial(prepare, out, source, overwrite))
    with context.megatron_calls():
        write_sharded(_sharded(model), staging_of(out), lambda: context.barrier("weights written"))
    record = {"format": "megatron_hdpo weights", "version": _VERSION, "architecture": vars(architecture)}
    together(context, partial(copy_description, source, staging_of(out) / DESCRIPTION, dtype))
    together(context, lambda: (staging_of(out) / _RECORD).write_text(json.dumps(record, indent=2) + "\n"))
    together(context, partial(publish, out))


def load_megatron(model: nn.Module, architecture: Architecture, context: ParallelContext, path: str | Path) -> None:
    """Fill this rank's parameters from a distributed checkpoint written at any layout; padded rows become zero.

    Collective over all ranks. An optimizer's state in the checkpoint is ignored. Raises WeightsError that lists every
    tensor that is missing, unexpected or of a wrong shape.
    """
    with context.megatron_calls(), torch.no_grad():
        sharded = _sharded(model)
        lines = _mismatches(sharded, context, path)
        if lines:
            raise WeightsError("\n".join([f"{path} does not hold the weights of its {architecture.family}", *lines]))
        state = read_sharded(sharded, path)
        own = dict(unwrap(model).named_parameters())
        for name, parameter in own.items():
            parameter.copy_(state[name])
    zero_padding(model, architecture, context)


def _sharded(model: nn.Module) -> dict[str, Any]:
    """Return Megatron's sharded state dict without Transformer Engine's extra states.

    They are no weights, and a plain-torch model has none.
    """
    state = unwrap(model).sharded_state_dict()
    return {name: value for name, value in state.items() if not name.endswith("_extra_state")}


def _mismatches(sharded: dict[str, Any], context: ParallelContext, path: str | Path) -> list[str]:
    stored = read_tensors(path)
    wanted = {tensor.key: tensor for value in sharded.values() for tensor in _tensors(value)}
    wrong = [
        f"{key}: {tuple(stored[key].global_shape)}, expected {tuple(tensor.global_shape)}"
        for key, tensor in wanted.items()
        # The padded vocabulary depends on the layout; rows after the last token are dropped.
        if key in stored and not tensor.allow_shape_mismatch and stored[key].global_shape != tensor.global_shape
    ]
    # Every rank raises what any rank found: a rank that went on alone would wait for the others forever.
    gathered = context.gather_objects((sorted(wanted), wrong))
    known = {key for keys, _ in gathered for key in keys}
    wrong = sorted({line for _, lines in gathered for line in lines})
    return [
        *listed("missing", sorted(known - stored.keys())),
        *listed("unexpected", sorted(key for key in stored.keys() - known if not _NOT_WEIGHTS.match(key))),
        *listed("of a wrong shape", wrong),
    ]


def _tensors(value: Any) -> Iterator[ShardedTensor]:
    if isinstance(value, ShardedTensorFactory):
        value = value.build()
    if isinstance(value, ShardedTensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
