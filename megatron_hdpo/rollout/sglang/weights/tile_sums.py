"""Triton kernel of the GPU digest: sums over tiles of 32-bit words, each word mixed with its place."""

# Triton infers the types of these functions itself; Python annotations would have no meaning.
# mypy: disable-error-code="no-untyped-def, attr-defined"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_WORDS, NUM_WARPS = 2048, 4

_SEED = 0x243F6A88
# The constants of SGLang's `gpu_tensor_hash` with its default seed.
_SEED_1 = tl.constexpr(_SEED)
_SEED_2 = tl.constexpr((_SEED * 0x9E3779B1 ^ 0xDEADBEEF) & 0xFFFFFFFF)
_PLACE_1, _PLACE_2 = tl.constexpr(0x27D4EB2D), tl.constexpr(0x165667B1)
_MIX_1, _MIX_2 = tl.constexpr(0x85EBCA6B), tl.constexpr(0xC2B2AE35)


def tile_sums(words: Tensor, first: int, total: int, tile: int) -> Tensor:
    """Return the two sums, int32 [tiles, 2], of every tile that a piece of a parameter touches.

    words: int32, [n] contiguous or [rows, n] with any stride between rows; followed by zeros up to `total` words.
    first: place of the piece's first word in its parameter. tile: words per tile. A shared tile's sums are partial.
    """
    first_tile, end_tile = first // tile, -(-(first + total) // tile)
    sums = torch.empty((end_tile - first_tile, 2), dtype=torch.int32, device=words.device)
    row_words, row_stride = (words.shape[1], words.stride(0)) if words.dim() == 2 else (0, 0)
    with torch.cuda.device_of(words):
        tile_sums_kernel[(len(sums),)](
            words, sums, first_tile * tile, first, words.numel(), total, row_words, row_stride,
            ROWS=words.dim() == 2, TILE=tile, BLOCK=BLOCK_WORDS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return sums


@triton.jit
def tile_sums_kernel(
    words_ptr, sums_ptr, start, first, valid, total, row_words, row_stride,
    ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the two sums of one tile per program; start: the first tile's first word."""
    begin = start + tl.program_id(0) * TILE
    shift = begin - first
    sums_1 = tl.zeros((BLOCK,), tl.uint32)
    sums_2 = tl.zeros((BLOCK,), tl.uint32)
    for offset in tl.static_range(0, TILE, BLOCK):
        lane = offset + tl.arange(0, BLOCK)
        index = shift + lane
        mine = (index >= 0) & (index < total)
        address = (index // row_words).to(tl.int64) * row_stride + index % row_words if ROWS else index
        word = tl.load(words_ptr + address, mask=mine & (index < valid), other=0).to(tl.uint32, bitcast=True)
        place = (begin + lane).to(tl.uint32)
        mixed_1 = _mix(word ^ _of_place(place, _PLACE_1, _SEED_1, 15))
        mixed_2 = _mix(word ^ _of_place(place, _PLACE_2, _SEED_2, 13))
        sums_1 += tl.where(mine, mixed_1, 0)
        sums_2 += tl.where(mine, mixed_2, 0)
    row = sums_ptr + tl.program_id(0) * 2
    tl.store(row, tl.sum(sums_1, axis=0).to(tl.int32, bitcast=True))
    tl.store(row + 1, tl.sum(sums_2, axis=0).to(tl.int32, bitcast=True))


@triton.jit
def _of_place(place, FACTOR: tl.constexpr, SEED: tl.constexpr, TURN: tl.constexpr):
    factor, seed = tl.full((), FACTOR, tl.uint32), tl.full((), SEED, tl.uint32)
    return (place * factor + seed) ^ ((place << TURN) | (place >> (32 - TURN)))


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * tl.full((), _MIX_1, tl.uint32)
    x = (x ^ (x >> 13)) * tl.full((), _MIX_2, tl.uint32)
    return x ^ (x >> 16)
