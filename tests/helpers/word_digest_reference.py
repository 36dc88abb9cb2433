"""The digest that a server on a GPU computes, written down in int64 arithmetic, word by word."""

from __future__ import annotations

import torch
from torch import Tensor

SIZES = [1, 4, 6, 1023, 32768, 32771, 70001, 300000]
"""Bytes: below a word, whole words, odd ends, one tile of 8192 words exactly, just beyond it, many tiles."""

RECORDED = [
    "d7f1f4357db32352",
    "d8097d9413bc9b31",
    "cc19624358fd7f6f",
    "645103703325d7c4",
    "636b2d513320d9ec",
    "53a2e575e62dae95",
    "41d184dc5f488df2",
    "c12c00b9136bcb23",
]
"""Digests of `hashed_tensor` of these sizes."""

_MASK, _MASK_64, _SEED, _TILE = 0xFFFFFFFF, (1 << 64) - 1, 0x243F6A88, 8192


def hashed_tensor(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)


def word_digest(tensor: Tensor) -> str:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8)
    padded = torch.zeros(-(-len(raw) // 4) * 4, dtype=torch.uint8)
    padded[: len(raw)] = raw
    words = padded.view(torch.int32).to(torch.int64) & _MASK
    place = torch.arange(len(words))
    seeds = _SEED, ((_SEED * 0x9E3779B1) ^ 0xDEADBEEF) & _MASK
    high = _tiles(words, place, 0x27D4EB2D, seeds[0], turn=15)
    low = _tiles(words, place, 0x165667B1, seeds[1], turn=13)
    total = sum((h << 32) | w for h, w in zip(high.tolist(), low.tolist(), strict=True)) & _MASK_64
    total = ((total ^ (total >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    total = ((total ^ (total >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return f"{total ^ (total >> 31):016x}"


def _tiles(words: Tensor, place: Tensor, factor: int, seed: int, turn: int) -> Tensor:
    rotated = ((place << turn) | (place >> (32 - turn))) & _MASK
    mixed = _mix(words ^ (((place * factor + seed) & _MASK) ^ rotated))
    tiles = torch.nn.functional.pad(mixed, (0, -len(mixed) % _TILE)).view(-1, _TILE)
    return _mix((tiles.sum(dim=1) & _MASK) ^ (len(words) * 4 & _MASK))


def _mix(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)
