"""Packing of sequences of different lengths into one row of tokens, and their distribution over micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_hdpo.model.segments import Segments, own_rows, shared_sequences, whole_sequences


@dataclass(frozen=True)
class RowLayout:
    """Distribution of the rows of a packed micro-batch over ranks.

    multiple: the number of rows of one context-parallel rank is a multiple of this (TP under sequence parallelism).
    context: context-parallel ranks that share every sequence. context_rank: this rank's index among them.
    """

    multiple: int = 1
    context: int = 1
    context_rank: int = 0

    @property
    def chunks(self) -> int:
        """Number of equal chunks of a sequence.

        Each context-parallel rank takes one chunk from the beginning and one from the end, so that causal attention
        costs all ranks the same.
        """
        return 1 if self.context == 1 else 2 * self.context

    def padded(self, length: int) -> int:
        """Return the number of rows, over all ranks, of a sequence of `length` tokens."""
        return length + -length % self.chunks

    def rows(self, lengths: Sequence[int]) -> int:
        """Return the number of rows, over all ranks, of a micro-batch of sequences of these lengths."""
        whole = math.lcm(self.chunks, self.context * self.multiple)
        total = sum(map(self.padded, lengths))
        return total + -total % whole if total else whole


@dataclass
class PackedRowParams(PackedSeqParams):
    """Megatron's description of the sequences' boundaries, and what the plain-torch layers read instead of it.

    Megatron's has the boundaries on the device only, so that whoever needs them on the host waits for the device.

    positions_M: position of each row of this rank in its sequence, int64. segments: what each row attends to.
    """

    positions_M: torch.Tensor | None = None
    segments: Segments | None = None

    def as_one_sequence(self) -> PackedRowParams:
        """Return the same description with Megatron told that the rows are one sequence (format sbhd)."""
        params = copy(self)
        params.qkv_format = "sbhd"
        return params


@dataclass(frozen=True)
class PackedSequences:
    """One packed micro-batch: sequences back to back, followed by a padding sequence.

    Under context parallelism each sequence is padded at its end too, where causal attention hides the padding from the
    real tokens. Then `tokens_M` and `positions_M` are the rows of this rank; all other fields count the rows of all
    ranks.

    tokens_M, positions_M: int64 [M]. cu_seqlens: int32 [number of sequences + 1], the padding sequence included.
    starts: first row of each real sequence. longest: rows of the longest sequence, the padding sequence included.
    num_tokens: rows of the micro-batch, padding included. own_rows_M: the rows of this rank among them, int64 [M].
    boundaries: `cu_seqlens` on the host. layout: the distribution over ranks that they were packed for.
    """

    tokens_M: torch.Tensor
    positions_M: torch.Tensor
    cu_seqlens: torch.Tensor
    starts: tuple[int, ...]
    longest: int
    num_tokens: int
    own_rows_M: np.ndarray
    boundaries: np.ndarray
    layout: RowLayout

    def packed_seq_params(self) -> PackedRowParams:
        """Return Megatron's description of the sequence boundaries (format thd)."""
        shared = len(self.own_rows_M) < self.num_tokens
        # For sequences shared by ranks, Transformer Engine needs the boundaries with padding. Padding counts as tokens
        # here, so both are the same.
        padded = self.cu_seqlens if shared else None
        return PackedRowParams(
            qkv_format="thd",
            cu_seqlens_q=self.cu_seqlens,
            cu_seqlens_kv=self.cu_seqlens,
            cu_seqlens_q_padded=padded,
            cu_seqlens_kv_padded=padded,
            max_seqlen_q=self.longest,
            max_seqlen_kv=self.longest,
            positions_M=self.positions_M,
            segments=self._segments(),
        )

    def _segments(self) -> Segments:
        if self.layout.context == 1:
            return whole_sequences(self.boundaries, self.cu_seqlens)
        device = self.cu_seqlens.device
        return shared_sequences(self.boundaries, self.layout.context, self.layout.context_rank, device)

    def own(self, rows_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which of the micro-batch's rows `rows_N` this rank holds (indices into it), and their local rows."""
        local = np.full(self.num_tokens, -1)
        local[self.own_rows_M] = np.arange(len(self.own_rows_M))
        places = np.flatnonzero(local[rows_N] >= 0)
        return places, local[rows_N[places]]


def pack(sequences: Sequence[np.ndarray], device: torch.device, rows: RowLayout | None = None) -> PackedSequences:
    """Pack integer token sequences back to back on `device`.

    An empty list gives a micro-batch of padding only: a rank without work must still join every collective.
    """
    rows = rows or RowLayout()
    lengths = [rows.padded(len(ids)) for ids in sequences]
    padding = rows.rows(lengths) - sum(lengths)
    all_lengths = [*lengths, padding] if padding else lengths
    boundaries = np.concatenate([[0], np.cumsum(all_lengths)])
    tokens = np.zeros(boundaries[-1], dtype=np.int64)
    for start, ids in zip(boundaries, sequences, strict=False):
        tokens[start : start + len(ids)] = ids
    positions = np.concatenate([np.arange(length) for length in all_lengths])
    own = own_rows(boundaries, rows.context, rows.context_rank)
    return PackedSequences(
        tokens_M=torch.from_numpy(tokens[own]).to(device),
        positions_M=torch.from_numpy(positions[own]).to(device),
        cu_seqlens=torch.from_numpy(boundaries.astype(np.int32)).to(device),
        starts=tuple(int(start) for start in boundaries[: len(lengths)]),
        longest=max(all_lengths),
        num_tokens=int(boundaries[-1]),
        own_rows_M=own,
        boundaries=boundaries,
        layout=rows,
    )


def bin_by_tokens(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Bin the indices of sequences so that no bin exceeds `budget` tokens, by first-fit decreasing.

    Deterministic. Raises ValueError on a sequence longer than the budget.
    """
    too_long = [length for length in lengths if length > budget]
    if too_long:
        raise ValueError(f"a sequence of {max(too_long)} tokens does not fit a micro-batch of {budget} tokens")
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for b, left in enumerate(room):
            if lengths[index] <= left:
                bins[b].append(index)
                room[b] -= lengths[index]
                break
        else:
            bins.append([index])
            room.append(budget - lengths[index])
    return bins


def split_by_cost(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Distribute the indices of items over `parts` ranks with nearly equal sums of cost.

    The most expensive item first, each to the rank with the smallest load (of equal loads, with the fewest items).
    """
    loads = [(0.0, 0)] * parts
    assigned: list[list[int]] = [[] for _ in range(parts)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        part = loads.index(min(loads))
        assigned[part].append(index)
        loads[part] = (loads[part][0] + costs[index], len(assigned[part]))
    return [sorted(indices) for indices in assigned]
