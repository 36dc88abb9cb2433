"""Loading of Hugging Face safetensors into a Megatron model on any TP x PP layout."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.weights.errors import WeightsError
from megatron_hdpo.weights.hf_files import HfWeights
from megatron_hdpo.weights.mapping import ParameterShard, Slot, tensors
from megatron_hdpo.weights.parameters import bind

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def load_hf(model: nn.Module, architecture: Architecture, context: ParallelContext, path: str | Path) -> None:
    """Fill this rank's parameters from the Hugging Face folder `path`; padded vocabulary rows become zero.

    model: a bare GPTModel or one inside Megatron's DDP; parameters are written in place, cast to their own type. An
    optimizer with main weights of its own must be built afterwards, or reload them.
    Each rank opens every file and reads only its own slices, one tensor at a time. Not collective.
    Raises WeightsError that lists every parameter and tensor that is missing, unexpected or of a wrong shape, before
    anything is written. A stored `lm_head.weight` beside tied embeddings is accepted only if it equals them.
    """
    bound = bind(model, architecture, context)
    with HfWeights(path) as weights, torch.no_grad():
        _check_names(weights, architecture)
        for slot, (parameter, shard) in bound.items():
            _fill(parameter, slot, shard, weights)
            if architecture.tied and slot.split == "vocabulary":
                _check_tied_head(weights, shard)


def check_weights(architecture: Architecture, path: str | Path) -> None:
    """Raise WeightsError as `load_hf` would, from the headers of the files of a Hugging Face folder."""
    with HfWeights(path) as weights:
        _check_names(weights, architecture)


def _check_names(weights: HfWeights, architecture: Architecture) -> None:
    lines = weights.mismatches(tensors(architecture), [_HEAD] if architecture.tied else [])
    if lines:
        raise WeightsError(
            "\n".join([f"{weights.path} does not hold the {architecture.family} of its config.json", *lines])
        )


def zero_padding(model: nn.Module, architecture: Architecture, context: ParallelContext) -> None:
    """Zero the vocabulary rows after the last token, in the embedding and the output layer of this rank."""
    with torch.no_grad():
        for parameter, shard in bind(model, architecture, context).values():
            if shard.padding:
                parameter[-shard.padding :].zero_()


def _fill(parameter: nn.Parameter, slot: Slot, shard: ParameterShard, weights: HfWeights) -> None:
    offset = 0
    for piece in filter(len, shard.pieces):
        values = weights.read(slot.sources[piece.source].name, shard.dim, piece.start, piece.stop)
        parameter.narrow(shard.dim, offset, len(piece)).copy_(values)
        offset += len(piece)
    if shard.padding:
        parameter.narrow(shard.dim, offset, shard.padding).zero_()


def _check_tied_head(weights: HfWeights, shard: ParameterShard) -> None:
    piece = shard.pieces[0]
    if _HEAD not in weights.names or not len(piece):
        return
    head, embedding = (weights.read(name, 0, piece.start, piece.stop) for name in (_HEAD, _EMBEDDING))
    if not torch.equal(head, embedding):
        raise WeightsError(
            f"{weights.path}: config.json ties the embeddings, but {_HEAD} differs from {_EMBEDDING} within rows "
            f"{piece.start}:{piece.stop}; set tie_word_embeddings to false, or remove {_HEAD}"
        )
