"""Attention of the plain-torch spec: what flash attention is asked, and what no layer asks the device for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from distributed_helper import run_ranks
from megatron.core.models.common.embeddings import rope_utils
from tiny_policy import SPEC, build_policy, joined, make_checkpoint, make_examples
from torch import Tensor

from megatron_hdpo.model import attention_kernels
from megatron_hdpo.model.attention_kernels import attend
from megatron_hdpo.model.packing import PackedRowParams, PackedSequences, RowLayout, pack
from megatron_hdpo.model.segments import Segments

HEADS, KV_HEADS, HEAD_DIM, SCALE = 6, 2, 8, 0.3
LENGTHS = (13, 1, 8, 24)
CPU = torch.device("cpu")


def documented_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    **_: Any,
) -> Tensor:
    """What flash attention computes for sequences of rows, as documented: causality is aligned to the last key."""
    assert window_size == (-1, 0) and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    queries, keys = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
    assert (max(queries), max(keys)) == (max_q, max_k)
    outputs = []
    for q, k, v in zip(query.split(queries), key.split(keys), value.split(keys), strict=True):
        k, v = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        unseen = torch.arange(len(k))[None] > torch.arange(len(q))[:, None] + len(k) - len(q)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(unseen, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


def _segments(context: int, rank: int) -> tuple[Segments, int]:
    """The segments of a rank, and the number of rows of keys that they index."""
    packed = pack([np.zeros(n, dtype=np.int32) for n in LENGTHS], CPU, RowLayout(context=context, context_rank=rank))
    segments = packed.packed_seq_params().segments
    assert segments is not None
    return segments, packed.num_tokens


@pytest.mark.parametrize(("context", "rank"), [(1, 0), (2, 0), (2, 1), (4, 2)])
def test_flash_attention_is_asked_for_what_the_calls_by_sequence_compute(
    monkeypatch: pytest.MonkeyPatch, context: int, rank: int
) -> None:
    segments, rows = _segments(context, rank)
    torch.manual_seed(0)
    query = torch.randn(sum(segments.queries), HEADS, HEAD_DIM, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(rows, KV_HEADS, HEAD_DIM, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(sum(segments.queries), HEADS, HEAD_DIM, dtype=torch.float64)

    def run() -> list[Tensor]:
        keys, values = (x if segments.key_rows is None else x[segments.key_rows] for x in (key, value))
        out = attend(query, keys, values, segments, SCALE)
        return [out, *torch.autograd.grad((out * weight).sum(), (query, key, value))]

    by_sequence = run()
    monkeypatch.setattr(attention_kernels, "takes_flash", lambda query: True)
    monkeypatch.setattr(attention_kernels, "varlen_attn", documented_varlen)
    for flash, expected in zip(run(), by_sequence, strict=True):
        torch.testing.assert_close(flash, expected)


def test_each_row_of_a_shared_sequence_sees_its_past_and_nothing_else() -> None:
    """Keys by their position among all rows, worked out from the packing alone."""
    context = 2
    for rank in range(context):
        layout = RowLayout(context=context, context_rank=rank)
        packed = pack([np.zeros(n, dtype=np.int32) for n in LENGTHS], CPU, layout)
        segments, _ = _segments(context, rank)
        others = [
            pack([np.zeros(n, dtype=np.int32) for n in LENGTHS], CPU, RowLayout(context=context, context_rank=other))
            for other in range(context)
        ]
        held = np.concatenate([other.own_rows_M for other in others])  # of what the ranks hold, rank after rank
        assert segments.key_rows is not None
        keys = np.split(held[segments.key_rows.numpy()], np.cumsum(segments.keys)[:-1])
        queries = np.split(packed.own_rows_M, np.cumsum(segments.queries)[:-1])
        starts = np.searchsorted(packed.boundaries, [rows[0] for rows in queries], side="right") - 1
        for seen, rows, start in zip(keys, queries, packed.boundaries[starts], strict=True):
            assert seen.tolist() == list(range(start, rows[-1] + 1))
            assert rows.tolist() == seen[-len(rows) :].tolist()


def _rotated_both_ways() -> tuple[bool, int]:
    """Whether rotation by position equals that by boundaries, and the number of tokens."""
    packed = pack([np.zeros(n, dtype=np.int32) for n in LENGTHS], CPU)
    torch.manual_seed(0)
    x = torch.randn(packed.num_tokens, HEADS, HEAD_DIM)
    angles = torch.randn(packed.longest, 1, 1, HEAD_DIM)
    with joined() as context:
        by_boundaries = rope_utils._apply_rotary_pos_emb_thd(x, packed.cu_seqlens, angles, cp_group=context.groups.cp)
    by_position = rope_utils._apply_rotary_pos_emb_bshd(x[:, None], angles.index_select(0, packed.positions_M))
    return torch.equal(by_position[:, 0], by_boundaries), packed.num_tokens


def test_rotation_by_position_is_that_by_boundaries() -> None:
    assert run_ranks(1, _rotated_both_ways) == [(True, sum(LENGTHS))]


class _Unreadable(torch.Tensor):
    """A tensor in which nothing can be done; stands for boundaries on a device, which cost a wait to read."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} reads the boundaries that are on the device")


def _steps_without_boundaries(path: Path) -> None:
    """Run a step of ranks that hold whole sequences, and of ranks that share them."""
    described = PackedSequences.packed_seq_params

    def unreadable(packed: PackedSequences) -> PackedRowParams:
        boundaries = torch.zeros(0).as_subclass(_Unreadable)
        return replace(
            described(packed),
            cu_seqlens_q=boundaries,
            cu_seqlens_kv=boundaries,
            cu_seqlens_q_padded=boundaries,
            cu_seqlens_kv_padded=boundaries,
        )

    with patch.object(PackedSequences, "packed_seq_params", unreadable):
        for layout in ({}, {"context": 2}):
            with joined(**layout) as context:
                policy = build_policy(path, context, model={"recompute": "full"})
                policy.accumulate_gradients(make_examples()[:4], SPEC)


def test_no_layer_reads_the_boundaries_from_the_device(tmp_path: Path) -> None:
    run_ranks(2, _steps_without_boundaries, make_checkpoint("qwen2", tmp_path))
