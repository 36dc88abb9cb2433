"""The entries of an id matrix in this rank's shard of the logits: read, overwritten, cut into blocks of rows.

On a CPU the owned ones are counted and listed. On a device the host would wait for that count, so there all entries
are kept, with a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from megatron_hdpo.divergence.shard import VocabShard


class Entries(Protocol):
    """The entries of an id matrix [R, K] that lie in this rank's shard, ordered by token row."""

    def gather(self, logits_TV: Tensor, dtype: torch.dtype) -> Tensor:
        """Return this rank's logits at the ids, [R, K]; 0 for entries of other ranks: the sum over the ranks is whole.

        Not after `within`.
        """
        ...

    def write(self, values_RK: Tensor, out_TV: Tensor) -> None:
        """Overwrite `out` at the entries by their values. values_RK: of the whole id matrix, also after `within`."""
        ...

    def clear(self, out_TV: Tensor) -> None:
        """Overwrite `out` at the entries by 0."""
        ...

    def add(self, values_R: Tensor, out_TV: Tensor) -> None:
        """Add a value of each row to `out` at its entry, of ids with one column (K = 1)."""
        ...

    def within(self, blocks: Sequence[slice]) -> list[Entries]:
        """Return for each block of token rows the entries in it, with rows relative to the block's first one."""
        ...


def find_entries(ids_RK: Tensor, rows: Tensor | None, shard: VocabShard, host_rows: Tensor | None = None) -> Entries:
    """Find the entries that a shard owns.

    rows: the token of each row of ids, int64 [R], increasing; None if row i belongs to token i. host_rows: the same on
    the host, where they are known there: then nothing waits for the device.
    """
    if ids_RK.device.type == "cpu":
        return OwnedEntries.find(ids_RK, rows, shard)
    return MaskedEntries.find(ids_RK, rows, shard, host_rows)


def rows_within(rows: Tensor | None, blocks: Sequence[slice]) -> list[slice]:
    """Return for each of successive blocks of tokens the slice of the target's rows in it.

    rows: the token of each row, increasing; None if row i belongs to token i. The host waits for rows on a device.
    """
    if rows is None:
        return list(blocks)
    edges = torch.tensor([block.start for block in blocks] + [blocks[-1].stop], device=rows.device)
    return [slice(a, b) for a, b in pairwise(torch.searchsorted(rows, edges).tolist())]


@dataclass(frozen=True)
class OwnedEntries:
    """A list of the owned entries; on a device the host waits for its length.

    row: row of the entry in the logits; col: its local column. where: (row, column) of each entry in the id matrix,
    1-D; or None if all entries are owned, and then row is [R, 1] and col [R, K], which needs no memory beyond the ids.
    part: the rows of the id matrix that these entries are from, in that case.
    """

    row: Tensor
    col: Tensor
    where: tuple[Tensor, Tensor] | None
    shape: torch.Size
    part: slice = field(default_factory=lambda: slice(None))

    @classmethod
    def find(cls, ids_RK: Tensor, rows: Tensor | None, shard: VocabShard) -> OwnedEntries:
        """Find the owned entries; see find_entries."""
        owned_RK = (ids_RK >= shard.start) & (ids_RK < shard.start + shard.valid)
        if bool(owned_RK.all()):
            if rows is None:
                rows = torch.arange(ids_RK.shape[0], device=ids_RK.device)
            return cls(rows.unsqueeze(-1), ids_RK - shard.start if shard.start else ids_RK, None, ids_RK.shape)
        target_O, slot_O = owned_RK.nonzero(as_tuple=True)
        row_O = target_O if rows is None else rows[target_O]
        return cls(row_O, ids_RK[target_O, slot_O] - shard.start, (target_O, slot_O), ids_RK.shape)

    def pick(self, values_RK: Tensor) -> Tensor:
        """Select the values at the owned entries, in the shape of col."""
        return values_RK[self.part] if self.where is None else values_RK[self.where]

    def gather(self, logits_TV: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the logits at the ids; see Entries."""
        found = logits_TV[self.row, self.col].to(dtype)
        if self.where is None:
            return found
        out_RK = torch.zeros(self.shape, dtype=dtype, device=logits_TV.device)
        out_RK[self.where] = found
        return out_RK

    def write(self, values_RK: Tensor, out_TV: Tensor) -> None:
        """Overwrite `out` at the entries; see Entries."""
        out_TV[self.row, self.col] = self.pick(values_RK).to(out_TV.dtype)

    def clear(self, out_TV: Tensor) -> None:
        """Overwrite `out` at the entries by 0."""
        out_TV[self.row, self.col] = 0.0

    def add(self, values_R: Tensor, out_TV: Tensor) -> None:
        """Add a value of each row to `out`; see Entries."""
        out_TV[self.row, self.col] += self.pick(values_R.unsqueeze(-1))

    def within(self, blocks: Sequence[slice]) -> list[Entries]:
        """Return the entries of each block; see Entries."""
        cut = rows_within(self.row.flatten(), blocks)
        return [self._part(part, block.start) for part, block in zip(cut, blocks, strict=True)]

    def _part(self, part: slice, start: int) -> OwnedEntries:
        row, col = self.row[part] - start, self.col[part]
        if self.where is None:
            return replace(self, row=row, col=col, part=part)
        return replace(self, row=row, col=col, where=(self.where[0][part], self.where[1][part]))


@dataclass(frozen=True)
class MaskedEntries:
    """All entries of the id matrix, and which of them are owned; nothing here waits for the device.

    row: row in the logits, [R, 1]. col: local column [R, K], any valid one where an entry is not owned. host_rows: the
    token of each row of the id matrix; None if row i belongs to token i. part: the rows of the id matrix in question.
    """

    row: Tensor
    col: Tensor
    owned: Tensor
    host_rows: Tensor | None
    part: slice = field(default_factory=lambda: slice(None))

    @classmethod
    def find(
        cls, ids_RK: Tensor, rows: Tensor | None, shard: VocabShard, host_rows: Tensor | None = None
    ) -> MaskedEntries:
        """Find the owned entries; see find_entries."""
        owned_RK = (ids_RK >= shard.start) & (ids_RK < shard.start + shard.valid)
        known = rows if host_rows is None else host_rows
        if rows is None:
            rows = torch.arange(ids_RK.shape[0], device=ids_RK.device)
        return cls(rows.unsqueeze(-1), (ids_RK - shard.start).clamp(0, max(0, shard.valid - 1)), owned_RK, known)

    def gather(self, logits_TV: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the logits at the ids; see Entries."""
        return logits_TV[self.row, self.col].to(dtype).masked_fill_(~self.owned, 0.0)

    def write(self, values_RK: Tensor, out_TV: Tensor) -> None:
        """Overwrite `out` at the entries; see Entries."""
        self._overwrite(values_RK[self.part].to(out_TV.dtype), out_TV)

    def clear(self, out_TV: Tensor) -> None:
        """Overwrite `out` at the entries by 0."""
        self._overwrite(out_TV.new_zeros(()).expand(self.col.shape), out_TV)

    def _overwrite(self, values_RK: Tensor, out_TV: Tensor) -> None:
        """Overwrite `out` without knowing how many entries are owned.

        An entry that is not owned repeats the write of an owned one of its row; if there is none, the value stays.
        """
        some_R1 = self.owned.to(torch.uint8).argmax(-1, keepdim=True)
        col_R1 = self.col.gather(-1, some_R1)
        any_R1 = self.owned.gather(-1, some_R1)
        value_R1 = torch.where(any_R1, values_RK.gather(-1, some_R1), out_TV[self.row, col_R1])
        out_TV[self.row, torch.where(self.owned, self.col, col_R1)] = torch.where(self.owned, values_RK, value_R1)

    def add(self, values_R: Tensor, out_TV: Tensor) -> None:
        """Add a value of each row to `out`; see Entries."""
        out_TV[self.row, self.col] += values_R[self.part].unsqueeze(-1).masked_fill(~self.owned, 0.0)

    def within(self, blocks: Sequence[slice]) -> list[Entries]:
        """Return the entries of each block; see Entries."""
        cut = rows_within(self.host_rows, blocks)
        return [self._part(part, block.start) for part, block in zip(cut, blocks, strict=True)]

    def _part(self, part: slice, start: int) -> MaskedEntries:
        return replace(self, row=self.row[part] - start, col=self.col[part], owned=self.owned[part], part=part)
