"""Key-value cache for decoding with one length per row: rows are slots that fill from the left.

Unlike in a left-padded cache, rows of any length stand side by side, a new row takes a free slot at any time, and
nothing is concatenated: a step writes one column per row in place and reads a view.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

_COLUMN_STEP = 64


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [slots, heads, capacity, head_dim] each."""

    def __init__(self, view: SlotView) -> None:
        super().__init__()
        self._view = view

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Raise RuntimeError: `SlotCache.insert` must fill a slot before it is decoded."""
        raise RuntimeError("a slot is filled by SlotCache.insert before it is decoded")

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one new column per row, [B, heads, 1, head_dim], and return the columns in use, [B, heads, W, dim]."""
        view = self._view
        keys, values = _states(self)
        keys[view.rows_B, :, view.positions_B] = key_states[:, :, 0]
        values[view.rows_B, :, view.positions_B] = value_states[:, :, 0]
        rows = key_states.shape[0]
        return keys[:rows, :, : view.width], values[:rows, :, : view.width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (columns in use, 0), as `transformers` expects."""
        return self._view.width, 0

    def get_seq_length(self) -> int:
        """Return the number of columns in use."""
        return self._view.width

    def get_max_length(self) -> int:
        """Return -1: no fixed limit."""
        return -1


class SlotView:
    """State that all layers of a decoding step share: written rows, their positions, and the number of columns to read.

    rows_B, positions_B: int64.
    """

    def __init__(self) -> None:
        self.rows_B = torch.empty(0, dtype=torch.int64)
        self.positions_B = torch.empty(0, dtype=torch.int64)
        self.width = 0


class SlotCache(Cache):
    """Keys and values of sequences that decode together; slot r holds the tokens of row r from column 0 on.

    Grows when needed, and never beyond `max_tokens` = slots x columns as long as no step needs more than that.
    """

    def __init__(self, num_layers: int, max_tokens: int) -> None:
        self._view = SlotView()
        self._max_tokens = max_tokens
        super().__init__(layers=[SlotLayer(self._view) for _ in range(num_layers)])

    @property
    def _slot_layers(self) -> list[SlotLayer]:
        return cast("list[SlotLayer]", self.layers)

    @property
    def slots(self) -> int:
        """Number of allocated slots."""
        layer = self._slot_layers[0]
        return _states(layer)[0].shape[0] if layer.is_initialized else 0

    @property
    def columns(self) -> int:
        """Number of allocated tokens per slot."""
        layer = self._slot_layers[0]
        return _states(layer)[0].shape[2] if layer.is_initialized else 0

    def insert(self, row: int, repeats: int, prefilled: Cache, source_row: int, length: int) -> None:
        """Copy `length` tokens of one row of a prefilled cache into slots row ... row + repeats - 1."""
        for layer, source in zip(self.layers, prefilled.layers, strict=True):
            for states, prefilled_states in zip(_states(layer), _states(source), strict=True):
                states[row : row + repeats, :, :length] = prefilled_states[source_row, :, :length]

    def move(self, sources: list[int], targets: list[int], width: int) -> None:
        """Copy slots onto other slots, to close the gaps that finished sequences leave."""
        for layer in self.layers:
            for states in _states(layer):
                states[targets, :, :width] = states[sources, :, :width]

    def plan_step(self, positions_B: torch.Tensor, width: int) -> None:
        """Set up the next decoding step: row r of B writes its token at positions_B[r]; `width` columns are read."""
        self._view.rows_B = torch.arange(len(positions_B), device=positions_B.device)
        self._view.positions_B = positions_B
        self._view.width = width

    def reserve(self, rows: int, length: int, like: Cache | None = None) -> None:
        """Allocate room for `rows` sequences of `length` tokens (the longest in use included) and keep the contents.

        like: a prefilled cache that gives shape, dtype and device; needed while nothing is allocated.
        """
        if rows <= self.slots and length <= self.columns:
            return
        slots, columns = self._capacity(rows, length)
        templates = self.layers if self._slot_layers[0].is_initialized else like.layers  # type: ignore[union-attr]
        for layer, template in zip(self._slot_layers, templates, strict=True):
            layer.keys = _resized(layer.keys, _states(template)[0], slots, columns)
            layer.values = _resized(layer.values, _states(template)[1], slots, columns)
            layer.is_initialized = True

    def _capacity(self, rows: int, length: int) -> tuple[int, int]:
        """Return the slots and columns to allocate.

        Generous if memory allows, so that a long response causes few copies.
        """
        columns = self.columns if length <= self.columns else max(length, self.columns * 3 // 2)
        columns += -columns % _COLUMN_STEP
        slots = max(rows, self.slots)
        if slots * columns > self._max_tokens:
            slots = rows
            columns = max(length, min(columns, self._max_tokens // slots))
        return slots, columns

    def drop(self) -> None:
        """Free the memory."""
        for layer in self._slot_layers:
            layer.keys, layer.values, layer.is_initialized = None, None, False


def _states(layer: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys and the values of a layer that is initialized."""
    assert isinstance(layer, CacheLayerMixin) and layer.keys is not None and layer.values is not None
    return layer.keys, layer.values


def _resized(old: torch.Tensor | None, template: torch.Tensor, slots: int, columns: int) -> torch.Tensor:
    # Zeros, not empty: a masked column has weight 0, and 0 times what an empty tensor happens to hold may be NaN.
    new = template.new_zeros(slots, template.shape[1], columns, template.shape[3])
    if old is not None:
        kept = old[:slots, :, :columns]
        new[: kept.shape[0], :, : kept.shape[2]] = kept
    return new
