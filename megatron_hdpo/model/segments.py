"""Which rows of keys each row of a packed micro-batch attends to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from megatron_hdpo.types.transfer import to_device


@dataclass(frozen=True)
class Segments:
    """Runs of this rank's rows of queries, each with the rows of keys that the run attends to.

    The queries of a segment are the last rows of its keys, and each attends to the keys up to its own row. A segment is
    a sequence; under context parallelism it is one of this rank's two chunks of a sequence, and its keys are the rows
    of the sequence up to the end of the chunk.

    queries, keys: numbers of rows of each segment, on the host. cu_queries, cu_keys: their sums, int32 [segments + 1],
    on the device. key_rows: the keys of all segments back to back, as rows of what all context-parallel ranks hold,
    rank after rank; int64 on the device. None: the keys are the rows of the queries.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    cu_queries: Tensor
    cu_keys: Tensor
    key_rows: Tensor | None


def whole_sequences(boundaries: np.ndarray, cu_seqlens: Tensor) -> Segments:
    """Return the segments of a rank that holds whole sequences, which lie between `boundaries`.

    cu_seqlens: the boundaries on the device, int32.
    """
    lengths = tuple(np.diff(boundaries).tolist())
    return Segments(lengths, lengths, cu_seqlens, cu_seqlens, None)


def shared_sequences(boundaries: np.ndarray, ranks: int, rank: int, device: torch.device) -> Segments:
    """Return the segments of one of the context-parallel ranks that share the sequences between `boundaries`."""
    place = np.argsort(np.concatenate([own_rows(boundaries, ranks, other) for other in range(ranks)]))
    queries, keys, key_rows = [], [], []
    for start, stop in pairwise(boundaries.tolist()):
        chunk = (stop - start) // (2 * ranks)
        for index in (rank, 2 * ranks - 1 - rank):
            queries.append(chunk)
            keys.append((index + 1) * chunk)
            key_rows.append(place[start : start + keys[-1]])
    return Segments(
        queries=tuple(queries),
        keys=tuple(keys),
        cu_queries=_sums(queries, device),
        cu_keys=_sums(keys, device),
        key_rows=to_device(torch.from_numpy(np.concatenate(key_rows)), device),
    )


def own_rows(boundaries: np.ndarray, context: int, rank: int) -> np.ndarray:
    """Return the rows of a context-parallel rank, in its order, from sequences between `boundaries`.

    A rank holds chunks `rank` and `2 x context - 1 - rank` of each sequence, as in Megatron and Transformer Engine.
    """
    if context == 1:
        return np.arange(boundaries[-1])
    parts = []
    for start, stop in pairwise(boundaries):
        chunk = (stop - start) // (2 * context)
        for index in (rank, 2 * context - 1 - rank):
            parts.append(start + index * chunk + np.arange(chunk))
    return np.concatenate(parts)


def _sums(lengths: Sequence[int], device: torch.device) -> Tensor:
    return to_device(torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32), device)
