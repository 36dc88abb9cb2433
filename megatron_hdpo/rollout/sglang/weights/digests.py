"""Hash functions with which SGLang's weights_checker identifies the content of a parameter."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_TILE_WORDS = 8192
_SEED = 0x243F6A88
_CHUNK_TILES = 512
_MASK = 0xFFFFFFFF


def digest(tensor: Tensor, device: str) -> str:
    """Return the digest, 16 hexadecimal digits, that a server on `device` (cpu or cuda) computes."""
    number = _of_words(tensor) if device == "cuda" else _of_bytes(tensor)
    return f"{number:016x}"


def _of_bytes(tensor: Tensor) -> int:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return int.from_bytes(hashlib.sha256(raw.data).digest()[:8], "big")


def _of_words(tensor: Tensor) -> int:
    """Sum two murmur-like hashes of the 32-bit words of every tile of 8192, add up the tiles, and mix once more.

    In int64 arithmetic, where products wrap modulo 2^64 and are therefore right modulo 2^32.
    """
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if not len(raw):
        return 0
    padded = torch.zeros(-(-len(raw) // 4) * 4, dtype=torch.uint8, device=raw.device)
    padded[: len(raw)] = raw
    words = padded.view(torch.int32)
    num_bytes = len(words) * 4 & _MASK
    seeds = _SEED & _MASK, ((_SEED * 0x9E3779B1) ^ 0xDEADBEEF) & _MASK
    total = 0
    for start in range(0, len(words), _TILE_WORDS * _CHUNK_TILES):
        part = words[start : start + _TILE_WORDS * _CHUNK_TILES].to(torch.int64) & _MASK
        place = (torch.arange(start, start + len(part), device=part.device) & _MASK).to(torch.int64)
        first = _tiles(part, place, factor=0x27D4EB2D, seed=seeds[0], turn=15, num_bytes=num_bytes)
        second = _tiles(part, place, factor=0x165667B1, seed=seeds[1], turn=13, num_bytes=num_bytes)
        for high, low in zip(first.tolist(), second.tolist(), strict=True):
            total += (high << 32) | low
    return _splitmix(total)


def _tiles(words: Tensor, place: Tensor, factor: int, seed: int, turn: int, num_bytes: int) -> Tensor:
    """Return one 32-bit sum per tile."""
    rotated = ((place << turn) | (place >> (32 - turn))) & _MASK
    mixed = _mix(words ^ (((place * factor + seed) & _MASK) ^ rotated))
    tiles = torch.nn.functional.pad(mixed, (0, -len(mixed) % _TILE_WORDS)).view(-1, _TILE_WORDS)
    return _mix((tiles.sum(dim=1) & _MASK) ^ num_bytes)


def _mix(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def _splitmix(x: int) -> int:
    mask = (1 << 64) - 1
    x &= mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)
