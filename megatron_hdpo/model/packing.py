"""Sequences of different lengths in one row of tokens, and their order in micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass(frozen=True)
class PackedSequences:
    """One micro-batch: sequences back to back in one row, padded at its end by a sequence of its own.

    tokens_T, positions_T: int64 [T]. cu_seqlens: int32 [number of sequences + 1], the padding's included.
    starts: row at which each real sequence begins. longest: rows of the longest sequence, the padding's included.
    """

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    cu_seqlens: torch.Tensor
    starts: tuple[int, ...]
    longest: int

    @property
    def num_tokens(self) -> int:
        """Rows of the micro-batch, padding included."""
        return len(self.tokens_T)

    def packed_seq_params(self) -> PackedSeqParams:
        """Megatron's description of the boundaries (thd)."""
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=self.cu_seqlens,
            cu_seqlens_kv=self.cu_seqlens,
            max_seqlen_q=self.longest,
            max_seqlen_kv=self.longest,
        )


def pack(sequences: Sequence[np.ndarray], device: torch.device, multiple: int = 1) -> PackedSequences:
    """Lay int token sequences back to back on `device`, rows rounded up to `multiple` (sequence parallelism: TP).

    No sequence at all is allowed and gives `multiple` rows of padding: a rank without work still joins every
    collective.
    """
    lengths = [len(ids) for ids in sequences]
    total = sum(lengths)
    padding = -total % multiple if total else max(multiple, 1)
    all_lengths = [*lengths, padding] if padding else lengths
    tokens = np.concatenate([*sequences, np.zeros(padding, dtype=np.int64)]).astype(np.int64)
    positions = np.concatenate([np.arange(length) for length in all_lengths])
    boundaries = np.concatenate([[0], np.cumsum(all_lengths)])
    return PackedSequences(
        tokens_T=torch.from_numpy(tokens).to(device),
        positions_T=torch.from_numpy(positions).to(device),
        cu_seqlens=torch.from_numpy(boundaries.astype(np.int32)).to(device),
        starts=tuple(int(start) for start in boundaries[: len(lengths)]),
        longest=max(all_lengths),
    )


def bin_by_tokens(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of sequences, binned so that no bin exceeds `budget` tokens: first-fit decreasing.

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


def split_by_tokens(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Indices of items over `parts` ranks with nearly equal token sums: longest first to the least loaded."""
    loads = [0] * parts
    assigned: list[list[int]] = [[] for _ in range(parts)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        part = loads.index(min(loads))
        assigned[part].append(index)
        loads[part] += lengths[index]
    return [sorted(indices) for indices in assigned]
