"""One rank's shard of the vocabulary, and the three collectives of this room.

Vocabulary shards are contiguous and equal: rank r of `size` holds columns [r * width, (r + 1) * width).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# Scratch memory of one block of rows. On a CPU a block must fit the core's cache, so that the elementwise operations
# of a pass read the logits from memory only once; on a GPU it must be large enough to use the whole device.
_CPU_BLOCK_BYTES = 1024 * 1024
_GPU_BLOCK_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class VocabShard:
    """One rank's part of the vocabulary: `width` columns from global id `start` on, the first `valid` of them real."""

    group: dist.ProcessGroup | None
    rank: int
    size: int
    width: int
    vocab_size: int

    @classmethod
    def of(cls, width: int, group: dist.ProcessGroup | None, vocab_size: int | None) -> VocabShard:
        """Return the shard of a rank whose logits have `width` columns; raises ValueError if vocab_size does not fit.

        group: the tensor-parallel ranks; None for one rank. vocab_size: default width x ranks (no padding).
        """
        size = 1 if group is None else dist.get_world_size(group)
        rank = 0 if group is None else dist.get_rank(group)
        vocab_size = width * size if vocab_size is None else vocab_size
        if not 0 < vocab_size <= width * size:
            raise ValueError(
                f"vocab_size is {vocab_size}, but {size} shard(s) of {width} columns hold {width * size}: "
                "pass the tokenizer's vocabulary before padding, at least 1 and at most the padded size"
            )
        return cls(group, rank, size, width, vocab_size)

    @property
    def start(self) -> int:
        """Global id of the first column."""
        return self.rank * self.width

    @property
    def valid(self) -> int:
        """Number of columns that are real tokens; the rest are padding."""
        return max(0, min(self.width, self.vocab_size - self.start))

    def all_reduce_max_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its maximum over the ranks, in place, and return it."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums over the ranks of several tensors of one dtype, in one collective; inputs are not changed."""
        if self.size == 1:
            return list(tensors)
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat, op=dist.ReduceOp.SUM, group=self.group)
        parts = flat.split([t.numel() for t in tensors])
        return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Gather a tensor [...] of every rank to [size, ...], in rank order."""
        if self.size == 1:
            return tensor.unsqueeze(0)
        out = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(out, tensor.contiguous(), group=self.group)
        return torch.stack(out)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype to compute in: float64 for float64 tensors, float32 for all others."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def row_blocks(rows: int, width: int, tensor: Tensor, *, at_least: int = 1) -> Iterator[slice]:
    """Yield slices of rows whose scratch [rows, width] in the compute dtype has a size that suits the device.

    at_least: the smallest number of rows of a slice (the last one may be shorter).
    """
    budget = _CPU_BLOCK_BYTES if tensor.device.type == "cpu" else _GPU_BLOCK_BYTES
    step = max(at_least, budget // max(1, width * compute_dtype(tensor).itemsize))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))
