"""Teachers over a shard of the vocabulary, and the paired log-probs of the rows that have a target, block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_hdpo.divergence.kinds import LOG_ZERO
from megatron_hdpo.divergence.shard import OwnedEntries, Shard, row_blocks
from megatron_hdpo.divergence.targets import TopK


class Teacher(Protocol):
    """A teacher over this shard: `block(rows)` is [n, V / tp], logits or (ScatteredTopK) log-probs."""

    @property
    def rows(self) -> Tensor | None: ...

    @property
    def height(self) -> int:
        """Rows that a block should have at least (a matrix product wants many)."""
        ...

    def block(self, rows: slice) -> Tensor: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class ScatteredTopK:
    """A top-k target as log-probs over the shard: renormalised on the support, LOG_ZERO elsewhere."""

    target: TopK
    logprobs_RK: Tensor
    entries: OwnedEntries
    shard: Shard
    height: int = 1

    @classmethod
    def of(cls, target: TopK, shard: Shard, dtype: torch.dtype) -> ScatteredTopK:
        target = target.pruned()
        lp_RK = target.logprobs_TK.to(dtype).masked_fill(target.ids_TK < 0, LOG_ZERO)
        lp_RK = lp_RK - lp_RK.logsumexp(-1, keepdim=True)
        return cls(target, lp_RK, OwnedEntries.find(target.ids_TK, None, shard), shard)

    @property
    def rows(self) -> Tensor | None:
        return self.target.rows

    @property
    def live_R(self) -> Tensor:
        """Rows whose support is not empty."""
        return (self.target.ids_TK >= 0).any(-1)

    def block(self, rows: slice) -> Tensor:
        out = self.logprobs_RK.new_full((rows.stop - rows.start, self.shard.width), LOG_ZERO)
        part = self.entries.within([rows])[0]
        row, values = self.entries.row[part], self.entries.pick(self.logprobs_RK)[part]
        out[row - rows.start, self.entries.col[part]] = values
        return out

    def __len__(self) -> int:
        return self.logprobs_RK.shape[0]


@dataclass(frozen=True)
class DenseRows:
    """Log-probs of the rows that have a target; the normalisers are the group's.

    lse_teacher_R is None for a teacher that gives log-probs. best_R: the teacher's largest log-prob of each row.
    """

    teacher: Teacher
    shard: Shard
    temperature: float
    lse_R: Tensor
    lse_teacher_R: Tensor | None
    best_R: Tensor

    def teacher_logprobs(self, block: slice) -> Tensor:
        z = self.teacher.block(block)[:, : self.shard.valid].to(self.lse_R.dtype)
        if self.lse_teacher_R is None:
            return z
        return (z / self.temperature - self.lse_teacher_R[block].unsqueeze(-1)).clamp_min(LOG_ZERO)

    def student_logprobs(self, z: Tensor, block: slice) -> Tensor:
        return z.to(self.lse_R.dtype) / self.temperature - self.lse_R[block].unsqueeze(-1)

    def pair(self, logits_TV: Tensor, block: slice) -> tuple[Tensor, Tensor]:
        """(teacher, student) log-probs [n, valid] of a block of target rows."""
        rows = self.teacher.rows
        z = (logits_TV[block] if rows is None else logits_TV[rows[block]])[:, : self.shard.valid]
        return self.teacher_logprobs(block), self.student_logprobs(z, block)

    def blocks(self, like: Tensor) -> list[slice]:
        if not self.shard.valid:
            return []
        return list(row_blocks(len(self.teacher), self.shard.valid, like, at_least=self.teacher.height))
