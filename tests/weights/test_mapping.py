"""The tables: interleaving against an index-by-index definition, and shards that tile every tensor exactly once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hdpo.model.architecture import Architecture, Family
from megatron_hdpo.weights.mapping import Slot, all_slots, shard_of, stage_slots, tensors

BASE = Architecture(
    family="qwen2",
    num_layers=4,
    hidden_size=6,
    ffn_size=24,
    num_heads=8,
    num_kv_heads=4,
    head_dim=2,
    vocab_size=499,
    max_positions=64,
    norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling=None,
    qkv_bias=True,
    qk_norm=False,
    tied=False,
)


def _slot(architecture: Architecture, name: str) -> Slot:
    return next(slot for slot in stage_slots(architecture, 1, 0) if name in slot.names)


def _shard_rows(architecture: Architecture, slot: Slot, tensor_parallel: int, rank: int) -> list[tuple[int, int]]:
    """(source, row) of every row of a rank's shard."""
    pieces = shard_of(architecture, slot, tensor_parallel, rank).pieces
    return [(piece.source, row) for piece in pieces for row in range(piece.start, piece.stop)]


@settings(deadline=None, max_examples=60)
@given(
    ranks=st.sampled_from([1, 2, 3, 4]),
    groups_per_rank=st.integers(1, 3),
    queries_per_group=st.integers(1, 4),
    head_dim=st.integers(1, 5),
    name=st.sampled_from(["weight", "bias"]),
)
def test_qkv_is_interleaved_by_group(
    ranks: int, groups_per_rank: int, queries_per_group: int, head_dim: int, name: str
) -> None:
    """Megatron's row i is, counted over all ranks: group i // ((q + 2) d), then q query heads, the key, the value."""
    groups = ranks * groups_per_rank
    architecture = replace(BASE, num_kv_heads=groups, num_heads=groups * queries_per_group, head_dim=head_dim)
    slot = _slot(architecture, f"decoder.layers.2.self_attention.linear_qkv.{name}")
    assert [source.name.split(".")[-2] for source in slot.sources] == ["q_proj", "k_proj", "v_proj"]
    expected = []
    for row in range(groups * (queries_per_group + 2) * head_dim):
        head, within = divmod(row, head_dim)
        group, place = divmod(head, queries_per_group + 2)
        if place < queries_per_group:
            expected.append((0, (group * queries_per_group + place) * head_dim + within))
        else:
            expected.append((place - queries_per_group + 1, group * head_dim + within))
    found = [row for rank in range(ranks) for row in _shard_rows(architecture, slot, ranks, rank)]
    assert found == expected


def test_gate_and_up_are_stacked_per_rank() -> None:
    slot = _slot(BASE, "decoder.layers.0.mlp.linear_fc1.weight")
    assert [source.name for source in slot.sources] == [
        f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up")
    ]
    assert _shard_rows(BASE, slot, 2, 1) == [(part, row) for part in (0, 1) for row in range(12, 24)]


def test_vocabulary_is_padded_behind_the_last_token() -> None:
    slot = _slot(BASE, "embedding.word_embeddings.weight")
    first, last = (shard_of(BASE, slot, 2, rank) for rank in (0, 1))
    assert (first.shape, first.padding) == ((256, 6), 0)
    assert (last.shape, last.padding) == ((256, 6), 512 - 499)
    assert [(piece.start, piece.stop) for piece in (*first.pieces, *last.pieces)] == [(0, 256), (256, 499)]


def test_a_rank_may_hold_nothing_but_padding() -> None:
    architecture = replace(BASE, vocab_size=100)
    shard = shard_of(architecture, _slot(architecture, "output_layer.weight"), 2, 1)
    assert (len(shard.pieces[0]), shard.padding) == (0, 128)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
def test_shards_tile_every_tensor_once(family: Family, tied: bool, tensor_parallel: int) -> None:
    architecture = replace(BASE, family=family, tied=tied)
    for _, slot in all_slots(architecture, 2):
        seen = [torch.zeros(source.shape, dtype=torch.int) for source in slot.sources]
        for rank in range(tensor_parallel):
            shard = shard_of(architecture, slot, tensor_parallel, rank)
            for piece in shard.pieces:
                seen[piece.source].narrow(shard.dim, piece.start, len(piece)).add_(1)
        copies = tensor_parallel if slot.split == "copy" else 1
        assert all(bool((count == copies).all()) for count in seen), slot


@pytest.mark.parametrize("pipeline", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_stages_hold_every_tensor_once_and_a_tied_head_twice(pipeline: int, tied: bool) -> None:
    architecture = replace(BASE, tied=tied)
    held = [
        s.name for stage in range(pipeline) for slot in stage_slots(architecture, pipeline, stage) for s in slot.sources
    ]
    extra = ["model.embed_tokens.weight"] if tied and pipeline > 1 else []
    assert sorted(held) == sorted([tensor.name for tensor in tensors(architecture)] + extra)
    assert ("lm_head.weight" in held) != tied


@pytest.mark.parametrize("pipeline", [1, 2, 4])
def test_the_order_does_not_depend_on_the_layout(pipeline: int) -> None:
    names = [source.name for _, slot in all_slots(BASE, pipeline) for source in slot.sources]
    assert names == [tensor.name for tensor in tensors(BASE)]
