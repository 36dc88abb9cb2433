"""Packing, binning and splitting: what must hold for any lengths."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hdpo.model.packing import RowLayout, bin_by_tokens, pack, split_by_cost

CPU = torch.device("cpu")
sequences_of = st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=9), max_size=6)
lengths_of = st.lists(st.integers(1, 40), max_size=30)


@settings(deadline=None)
@given(sequences_of, st.integers(1, 4))
def test_sequences_lie_back_to_back_with_padding_behind(sequences: list[list[int]], multiple: int) -> None:
    packed = pack([np.array(ids, dtype=np.int32) for ids in sequences], CPU, RowLayout(multiple))
    total = sum(map(len, sequences))
    assert packed.tokens_M.dtype == packed.positions_M.dtype == torch.int64
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.num_tokens % multiple == 0 and packed.num_tokens > 0
    assert total <= packed.num_tokens < total + multiple or (total == 0 and packed.num_tokens == multiple)
    assert packed.tokens_M.tolist() == [i for ids in sequences for i in ids] + [0] * (packed.num_tokens - total)
    boundaries = packed.cu_seqlens.tolist()
    assert boundaries[0] == 0 and boundaries[-1] == packed.num_tokens
    assert boundaries[: len(packed.starts)] == list(packed.starts)
    # Every sequence, and the padding as one more, is its own range, in which positions begin at 0.
    ranges = list(pairwise(boundaries))
    assert [stop - start for start, stop in ranges][: len(sequences)] == [len(ids) for ids in sequences]
    assert len(ranges) == len(sequences) + (packed.num_tokens > total)
    assert packed.positions_M.tolist() == [i for start, stop in ranges for i in range(stop - start)]
    params = packed.packed_seq_params()
    assert params.qkv_format == "thd" and params.max_seqlen_q == max(stop - start for start, stop in ranges)


@settings(deadline=None)
@given(lengths_of, st.integers(40, 100))
def test_bins_hold_everything_once_within_the_budget(lengths: list[int], budget: int) -> None:
    bins = bin_by_tokens(lengths, budget)
    assert sorted(i for indices in bins for i in indices) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in indices) for indices in bins]
    assert all(0 < load <= budget for load in loads)
    # First fit: what opened a bin fitted into none of those before it.
    for earlier, load in enumerate(loads):
        assert all(load + lengths[indices[0]] > budget for indices in bins[earlier + 1 :])
    assert bins == bin_by_tokens(list(lengths), budget)


def test_a_sequence_over_the_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="a sequence of 41 tokens does not fit a micro-batch of 40 tokens"):
        bin_by_tokens([3, 41, 7], 40)
    assert bin_by_tokens([40], 40) == [[0]]


@settings(deadline=None)
@given(lengths_of, st.integers(1, 5))
def test_parts_hold_everything_once_and_nearly_equal_sums(lengths: list[int], parts: int) -> None:
    split = split_by_cost(lengths, parts)
    assert len(split) == parts
    assert sorted(i for indices in split for i in indices) == list(range(len(lengths)))
    assert all(indices == sorted(indices) for indices in split)
    loads = [sum(lengths[i] for i in indices) for indices in split]
    assert max(loads) - min(loads) <= max(lengths, default=0)
    assert split == split_by_cost(list(lengths), parts)
