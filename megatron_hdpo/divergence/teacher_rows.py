"""Teacher and student log-probs of the rows that have a target, over a shard of the vocabulary, block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_hdpo.divergence.entries import Entries, find_entries
from megatron_hdpo.divergence.kinds import LOG_ZERO
from megatron_hdpo.divergence.shard import VocabShard, row_blocks
from megatron_hdpo.divergence.targets import TopK


class TeacherLogits(Protocol):
    """A teacher over this rank's shard of the vocabulary, read in blocks of target rows."""

    @property
    def rows(self) -> Tensor | None:
        """Return the token of each target row, int64 [R]; None if row i belongs to token i."""
        ...

    @property
    def host_rows(self) -> Tensor | None:
        """Return `rows` on the host; None if they are not known there."""
        ...

    @property
    def height(self) -> int:
        """Smallest sensible number of rows of a block (a matrix product is efficient only with many)."""
        ...

    def block(self, rows: slice) -> Tensor:
        """Return the logits [n, V / tp] of a slice of target rows; ScatteredTopK returns log-probs."""
        ...

    def __len__(self) -> int:
        """Return the number of target rows."""
        ...


@dataclass(frozen=True)
class ScatteredTopK:
    """A top-k target as log-probs over the shard, renormalised on the support and LOG_ZERO elsewhere."""

    target: TopK
    logprobs_RK: Tensor
    entries: Entries
    shard: VocabShard
    height: int = 1

    @classmethod
    def of(cls, target: TopK, shard: VocabShard, dtype: torch.dtype) -> ScatteredTopK:
        """Normalise a flat target on its support and find the entries that this shard holds."""
        target = target.pruned()
        lp_RK = target.logprobs_TK.to(dtype).masked_fill(target.ids_TK < 0, LOG_ZERO)
        lp_RK = lp_RK - lp_RK.logsumexp(-1, keepdim=True)
        return cls(target, lp_RK, find_entries(target.ids_TK, None, shard), shard)

    @property
    def rows(self) -> Tensor | None:
        """Return the token of each target row; see TeacherLogits."""
        return self.target.rows

    @property
    def host_rows(self) -> Tensor | None:
        """Return `rows` on the host; see TeacherLogits."""
        return self.target.host_rows

    @property
    def live_R(self) -> Tensor:
        """Return whether the support of each target row holds any id, bool [R]."""
        return (self.target.ids_TK >= 0).any(-1)

    def block(self, rows: slice) -> Tensor:
        """Return the log-probs [n, V / tp] of a slice of target rows."""
        out = self.logprobs_RK.new_full((rows.stop - rows.start, self.shard.width), LOG_ZERO)
        self.entries.within([rows])[0].write(self.logprobs_RK, out)
        return out

    def __len__(self) -> int:
        return self.logprobs_RK.shape[0]


@dataclass(frozen=True)
class DenseRows:
    """Log-probs of teacher and student at the rows that have a target, over this rank's shard.

    lse_R, lse_teacher_R: the log-normalisers over the whole group; lse_teacher_R is None for a teacher that returns
    log-probs. best_R: the teacher's largest log-prob of each row.
    """

    teacher: TeacherLogits
    shard: VocabShard
    temperature: float
    lse_R: Tensor
    lse_teacher_R: Tensor | None
    best_R: Tensor

    def teacher_logprobs(self, block: slice) -> Tensor:
        """Return the teacher's log-probs [n, valid] of a block of target rows."""
        z = self.teacher.block(block)[:, : self.shard.valid].to(self.lse_R.dtype)
        if self.lse_teacher_R is None:
            return z
        return (z / self.temperature - self.lse_teacher_R[block].unsqueeze(-1)).clamp_min(LOG_ZERO)

    def student_logprobs(self, z: Tensor, block: slice) -> Tensor:
        """Return the student's log-probs of a block of target rows from their logits z [n, valid]."""
        return z.to(self.lse_R.dtype) / self.temperature - self.lse_R[block].unsqueeze(-1)

    def pair(self, logits_TV: Tensor, block: slice) -> tuple[Tensor, Tensor]:
        """Return the (teacher, student) log-probs [n, valid] of a block of target rows."""
        rows = self.teacher.rows
        z = (logits_TV[block] if rows is None else logits_TV[rows[block]])[:, : self.shard.valid]
        return self.teacher_logprobs(block), self.student_logprobs(z, block)

    def blocks(self, like: Tensor) -> list[slice]:
        """Cut the target rows into blocks; none if this shard holds padding only. like: gives device and dtype."""
        if not self.shard.valid:
            return []
        return list(row_blocks(len(self.teacher), self.shard.valid, like, at_least=self.teacher.height))
