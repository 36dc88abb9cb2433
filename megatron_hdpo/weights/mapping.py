"""Which Hugging Face tensors a Megatron parameter is made of: one table per architecture.

The tables name a parameter twice where the two layer specs do (Transformer Engine fuses a norm into the linear layer
that follows it). How a parameter is split over tensor-parallel ranks is said once, as an ordered list of pieces of its
Hugging Face tensors (`shard_of`); loading reads these pieces, streaming puts them back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_hdpo.model.architecture import Architecture, Family

Split = Literal["copy", "rows", "columns", "vocabulary", "qkv", "gate_up"]
"""copy: every tensor-parallel rank holds the whole; rows, columns: equal ranges of dimension 0 or 1; vocabulary: rows,
with rows of zeros behind the last token; qkv: per key-value group its query heads, key head, value head; gate_up: the
rank's rows of the gate, then its rows of the up projection."""


@dataclass(frozen=True)
class Source:
    """A Hugging Face tensor: its name, with `{layer}` where it has one, and its shape in terms of the architecture."""

    name: str
    dims: tuple[str, ...]


@dataclass(frozen=True)
class Rule:
    """One row of a table: the parameter's name under both layer specs, its split, and what it is made of."""

    torch_name: str
    engine_name: str
    split: Split
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class HfTensor:
    """A Hugging Face tensor of one model: name and full shape."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Slot:
    """One Megatron parameter of one model.

    names: under the plain-torch and the Transformer Engine spec, counted within its stage.
    duplicate: the last stage's second copy of a tied embedding; it is loaded, but never exported.
    """

    names: tuple[str, str]
    split: Split
    sources: tuple[HfTensor, ...]
    duplicate: bool = False


@dataclass(frozen=True)
class Piece:
    """Range start:stop, along the shard's dimension, of the slot's Hugging Face tensor number `source`."""

    source: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Shard:
    """A rank's part of a parameter: pieces joined along `dim`, then `padding` rows of zeros."""

    dim: int
    pieces: tuple[Piece, ...]
    padding: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements of the shard, the padding's included."""
        return math.prod(self.shape)


def _same(name: str, split: Split, *sources: Source) -> Rule:
    return Rule(name, name, split, sources)


def _block(name: str, *dims: str) -> Source:
    return Source("model.layers.{layer}." + name, dims)


_EMBEDDING = _same(
    "embedding.word_embeddings.weight", "vocabulary", Source("model.embed_tokens.weight", ("vocab", "hidden"))
)
_FINAL = (_same("decoder.final_layernorm.weight", "copy", Source("model.norm.weight", ("hidden",))),)
_OUTPUT = _same("output_layer.weight", "vocabulary", Source("lm_head.weight", ("vocab", "hidden")))
_QKV = _same(
    "self_attention.linear_qkv.weight",
    "qkv",
    _block("self_attn.q_proj.weight", "query", "hidden"),
    _block("self_attn.k_proj.weight", "key", "hidden"),
    _block("self_attn.v_proj.weight", "key", "hidden"),
)
_QKV_BIAS = _same(
    "self_attention.linear_qkv.bias",
    "qkv",
    _block("self_attn.q_proj.bias", "query"),
    _block("self_attn.k_proj.bias", "key"),
    _block("self_attn.v_proj.bias", "key"),
)
_QK_NORM = (
    _same("self_attention.q_layernorm.weight", "copy", _block("self_attn.q_norm.weight", "head")),
    _same("self_attention.k_layernorm.weight", "copy", _block("self_attn.k_norm.weight", "head")),
)
_INPUT_NORM = Rule(
    "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight",
    "copy",
    (_block("input_layernorm.weight", "hidden"),),
)
_PROJECTION = _same(
    "self_attention.linear_proj.weight", "columns", _block("self_attn.o_proj.weight", "hidden", "query")
)
_MLP = (
    Rule(
        "pre_mlp_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight",
        "copy",
        (_block("post_attention_layernorm.weight", "hidden"),),
    ),
    _same(
        "mlp.linear_fc1.weight",
        "gate_up",
        _block("mlp.gate_proj.weight", "ffn", "hidden"),
        _block("mlp.up_proj.weight", "ffn", "hidden"),
    ),
    _same("mlp.linear_fc2.weight", "columns", _block("mlp.down_proj.weight", "hidden", "ffn")),
)

LAYER_TABLES: dict[Family, tuple[Rule, ...]] = {
    "llama": (_INPUT_NORM, _QKV, _PROJECTION, *_MLP),
    "qwen2": (_INPUT_NORM, _QKV, _QKV_BIAS, _PROJECTION, *_MLP),
    "qwen3": (_INPUT_NORM, _QKV, *_QK_NORM, _PROJECTION, *_MLP),
}


def layers_of_stage(architecture: Architecture, stages: int, stage: int) -> range:
    """Global indices of the decoder layers that a stage holds (equal stages)."""
    count = architecture.num_layers // stages
    return range(stage * count, (stage + 1) * count)


def stage_slots(architecture: Architecture, stages: int, stage: int) -> Iterator[Slot]:
    """The parameters of one stage, in the order in which they are streamed.

    Stages follow one another as tokens pass them: of S pipeline ranks with C chunks each, chunk c of rank r is stage
    c * S + r out of C * S.
    """
    last = stage == stages - 1
    if stage == 0:
        yield _slot(architecture, _EMBEDDING)
    for local, layer in enumerate(layers_of_stage(architecture, stages, stage)):
        for rule in LAYER_TABLES[architecture.family]:
            yield _slot(architecture, rule, f"decoder.layers.{local}.", layer)
    if last:
        for rule in _FINAL:
            yield _slot(architecture, rule)
    if last and not architecture.tied:
        yield _slot(architecture, _OUTPUT)
    if last and architecture.tied and stages > 1:
        copy = Rule(_OUTPUT.torch_name, _OUTPUT.engine_name, _EMBEDDING.split, _EMBEDDING.sources)
        yield _slot(architecture, copy, duplicate=True)


def all_slots(architecture: Architecture, stages: int) -> list[tuple[int, Slot]]:
    """(stage, slot) of everything that is exported, each Hugging Face tensor once, in stream order."""
    slots = ((stage, slot) for stage in range(stages) for slot in stage_slots(architecture, stages, stage))
    return [(stage, slot) for stage, slot in slots if not slot.duplicate]


def tensors(architecture: Architecture) -> list[HfTensor]:
    """Every tensor of the Hugging Face checkpoint, in stream order; it is the same for every layout."""
    return [tensor for _, slot in all_slots(architecture, 1) for tensor in slot.sources]


def shard_of(architecture: Architecture, slot: Slot, tensor_parallel: int, rank: int) -> Shard:
    """The part of a slot that tensor-parallel rank `rank` holds.

    The layout was checked against the architecture when the model was built (`check_layout`).
    """
    shape = slot.sources[0].shape
    dim = 1 if slot.split == "columns" else 0
    padding = 0
    if slot.split == "copy":
        pieces: tuple[Piece, ...] = (Piece(0, 0, shape[0]),)
    elif slot.split == "vocabulary":
        share = architecture.padded_vocab_size(tensor_parallel) // tensor_parallel
        start = min(rank * share, architecture.vocab_size)
        stop = min((rank + 1) * share, architecture.vocab_size)
        pieces, padding = (Piece(0, start, stop),), share - (stop - start)
    elif slot.split == "qkv":
        pieces = tuple(_grouped_heads(architecture, tensor_parallel, rank))
    else:
        share = shape[dim] // tensor_parallel
        pieces = tuple(Piece(i, rank * share, (rank + 1) * share) for i in range(len(slot.sources)))
    length = sum(map(len, pieces)) + padding
    return Shard(dim, pieces, padding, (*shape[:dim], length, *shape[dim + 1 :]))


def _grouped_heads(architecture: Architecture, tensor_parallel: int, rank: int) -> Iterator[Piece]:
    """Megatron's order of linear_qkv: for each key-value group its query heads, its key head, its value head."""
    head = architecture.head_dim
    query = head * (architecture.num_heads // architecture.num_kv_heads)
    groups = architecture.num_kv_heads // tensor_parallel
    for group in range(rank * groups, (rank + 1) * groups):
        yield Piece(0, group * query, (group + 1) * query)
        yield Piece(1, group * head, (group + 1) * head)
        yield Piece(2, group * head, (group + 1) * head)


def _slot(
    architecture: Architecture, rule: Rule, prefix: str = "", layer: int | None = None, duplicate: bool = False
) -> Slot:
    sizes = {
        "vocab": architecture.vocab_size,
        "hidden": architecture.hidden_size,
        "ffn": architecture.ffn_size,
        "query": architecture.num_heads * architecture.head_dim,
        "key": architecture.num_kv_heads * architecture.head_dim,
        "head": architecture.head_dim,
    }
    sources = tuple(
        HfTensor(source.name.format(layer=layer), tuple(sizes[dim] for dim in source.dims)) for source in rule.sources
    )
    return Slot((prefix + rule.torch_name, prefix + rule.engine_name), rule.split, sources, duplicate)
