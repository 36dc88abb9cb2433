"""The parameters of a model and their shards: the rows of its architecture's table, for every layer and expert.

`shard_of` is the only place that defines how a parameter is split over the ranks that share it: as an ordered list of
pieces of its Hugging Face tensors. Loading reads these pieces, streaming writes them back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain

from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.weights.tables import EMBEDDING, FINAL, LAYER_TABLES, OUTPUT, Rule, Split


@dataclass(frozen=True)
class HfTensor:
    """Name and full shape of a Hugging Face tensor of one model."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Slot:
    """One Megatron parameter of one model.

    names: under the plain-torch and the Transformer Engine spec, with layers counted within the stage.
    duplicate: the last stage's second copy of a tied embedding; it is loaded, but never exported.
    expert_ranks: 0 for a parameter that tensor-parallel ranks share. Otherwise the number of expert-parallel ranks: the
    parameter has the same name on each of them but belongs to another expert, and `sources` lists the tensors of all,
    rank by rank.
    """

    names: tuple[str, str]
    split: Split
    sources: tuple[HfTensor, ...]
    duplicate: bool = False
    expert_ranks: int = 0


@dataclass(frozen=True)
class Piece:
    """The range start:stop, along the shard's dimension, of the slot's Hugging Face tensor number `source`."""

    source: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class ParameterShard:
    """One rank's part of a parameter: pieces joined along `dim`, then `padding` rows of zeros."""

    dim: int
    pieces: tuple[Piece, ...]
    padding: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements of the shard, padding included."""
        return math.prod(self.shape)


def layers_of_stage(architecture: Architecture, stages: int, stage: int) -> range:
    """Return the global indices of the decoder layers of a stage; all stages have equally many."""
    count = architecture.num_layers // stages
    return range(stage * count, (stage + 1) * count)


def stage_slots(architecture: Architecture, stages: int, stage: int, expert_ranks: int = 1) -> Iterator[Slot]:
    """Yield the parameters of one stage on `expert_ranks` expert-parallel ranks, in the order of streaming.

    Stages are numbered in the order in which tokens pass them: with S pipeline ranks of C chunks each, chunk c of rank
    r is stage c * S + r out of C * S.
    """
    last = stage == stages - 1
    if stage == 0:
        yield _slot(architecture, EMBEDDING)
    for local, layer in enumerate(layers_of_stage(architecture, stages, stage)):
        prefix = f"decoder.layers.{local}."
        for rule in LAYER_TABLES[architecture.family]:
            if rule.of_experts:
                yield from _expert_slots(architecture, rule, prefix, layer, expert_ranks)
            else:
                yield _slot(architecture, rule, prefix, layer)
    if last:
        for rule in FINAL:
            yield _slot(architecture, rule)
    if last and not architecture.tied:
        yield _slot(architecture, OUTPUT)
    if last and architecture.tied and stages > 1:
        copy = Rule(OUTPUT.torch_name, OUTPUT.engine_name, EMBEDDING.split, EMBEDDING.sources)
        yield replace(_slot(architecture, copy), duplicate=True)


def all_slots(architecture: Architecture, stages: int, expert_ranks: int = 1) -> list[tuple[int, Slot]]:
    """Return (stage, slot) of all exported parameters, each Hugging Face tensor once, in stream order."""
    slots = ((n, slot) for n in range(stages) for slot in stage_slots(architecture, stages, n, expert_ranks))
    return [(stage, slot) for stage, slot in slots if not slot.duplicate]


def tensors(architecture: Architecture) -> list[HfTensor]:
    """Return all tensors of the Hugging Face checkpoint, in stream order for one rank.

    On other layouts only the order of a layer's experts differs.
    """
    return [tensor for _, slot in all_slots(architecture, 1) for tensor in slot.sources]


def shard_of(architecture: Architecture, slot: Slot, ranks: int, rank: int) -> ParameterShard:
    """Return the part of a slot on rank `rank` of the `ranks` ranks that share it.

    These are the tensor-parallel ranks; for the slots of experts `ranks` = EP x ETP, with ETP varying fastest.
    The layout was checked against the architecture when the model was built (`check_layout`).
    """
    shape = slot.sources[0].shape
    dim = 1 if slot.split == "columns" else 0
    padding = 0
    if slot.split == "copy":
        pieces: tuple[Piece, ...] = (Piece(0, 0, shape[0]),)
    elif slot.split == "vocabulary":
        share = architecture.padded_vocab_size(ranks) // ranks
        start = min(rank * share, architecture.vocab_size)
        stop = min((rank + 1) * share, architecture.vocab_size)
        pieces, padding = (Piece(0, start, stop),), share - (stop - start)
    elif slot.split == "qkv":
        pieces = tuple(_grouped_heads(architecture, ranks, rank))
    else:
        pieces = tuple(_equal_ranges(slot, shape[dim], ranks, rank))
    length = sum(map(len, pieces)) + padding
    return ParameterShard(dim, pieces, padding, (*shape[:dim], length, *shape[dim + 1 :]))


def _equal_ranges(slot: Slot, length: int, ranks: int, rank: int) -> Iterator[Piece]:
    """Yield the rank's range of every source; for experts only of the sources of its expert-parallel rank."""
    owners = max(slot.expert_ranks, 1)
    owner, part = divmod(rank, ranks // owners)
    share, count = length // (ranks // owners), len(slot.sources) // owners
    for source in range(owner * count, (owner + 1) * count):
        yield Piece(source, part * share, (part + 1) * share)


def _grouped_heads(architecture: Architecture, tensor_parallel: int, rank: int) -> Iterator[Piece]:
    """Yield the pieces in Megatron's order of linear_qkv: per key-value group its query heads, key head, value head."""
    head = architecture.head_dim
    query = head * (architecture.num_heads // architecture.num_kv_heads)
    groups = architecture.num_kv_heads // tensor_parallel
    for group in range(rank * groups, (rank + 1) * groups):
        yield Piece(0, group * query, (group + 1) * query)
        yield Piece(1, group * head, (group + 1) * head)
        yield Piece(2, group * head, (group + 1) * head)


def _slot(architecture: Architecture, rule: Rule, prefix: str = "", layer: int | None = None) -> Slot:
    return Slot(
        (prefix + rule.torch_name, prefix + rule.engine_name), rule.split, _tensors(architecture, rule, layer=layer)
    )


def _expert_slots(architecture: Architecture, rule: Rule, prefix: str, layer: int, expert_ranks: int) -> Iterator[Slot]:
    """Yield a slot for each expert of a rank; expert i of rank r is the layer's expert r x (experts per rank) + i."""
    per_rank = architecture.num_experts // expert_ranks
    for own in range(per_rank):
        names = tuple(prefix + name.format(expert=own) for name in (rule.torch_name, rule.engine_name))
        experts = range(own, architecture.num_experts, per_rank)
        sources = chain.from_iterable(_tensors(architecture, rule, layer=layer, expert=e) for e in experts)
        yield Slot(names, rule.split, tuple(sources), expert_ranks=expert_ranks)  # type: ignore[arg-type]


def _tensors(architecture: Architecture, rule: Rule, **numbers: int | None) -> tuple[HfTensor, ...]:
    sizes = {
        "vocab": architecture.vocab_size,
        "hidden": architecture.hidden_size,
        "ffn": architecture.ffn_size,
        "query": architecture.num_heads * architecture.head_dim,
        "key": architecture.num_kv_heads * architecture.head_dim,
        "head": architecture.head_dim,
        "experts": architecture.num_experts,
        "expert_ffn": architecture.expert_ffn_size,
    }
    return tuple(
        HfTensor(source.name.format(**numbers), tuple(sizes[dim] for dim in source.dims)) for source in rule.sources
    )
