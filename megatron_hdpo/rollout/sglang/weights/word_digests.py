"""Digests of a parameter's 32-bit words, as SGLang's GPU kernels define them, computed with one read of the weights.

Every tile of 8192 words has two 32-bit sums over its words, each mixed with its place in the parameter. A kernel per
piece computes the sums (`tile_sums.py`); they stay on the GPU, 8 bytes per 32 KiB, until `result` fetches all of them
at once. The remaining operations, a few per tile, run on the host.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Key = tuple[int, str]
"""A parameter of a server: rank and name."""
TILE_WORDS = 8192
WORD_BYTES = 4
_MASK_64 = (1 << 64) - 1


@dataclass
class _Parameter:
    """What is known of a parameter: its words so far, and where the sums of its tiles are.

    parts: per piece the first tile, the first row among all sums, and the number of rows; a tile that two pieces share
    has a row in each. ended: a piece ended within a word, so none may follow.
    """

    words: int = 0
    parts: list[tuple[int, int, int]] = field(default_factory=list)
    ended: bool = False


class WordDigests:
    """Digests of parameters whose pieces are on a GPU; see `Digests` in digests.py."""

    def __init__(self) -> None:
        self._parameters: dict[Key, _Parameter] = {}
        self._sums: list[Tensor] = []
        self._rows = 0

    def append(self, key: Key, piece: Tensor, padding: int = 0) -> None:
        """Append the bytes of a tensor and `padding` zero bytes to a parameter.

        Raises ValueError when an earlier piece of the parameter ended within a 32-bit word.
        """
        # torch's CPU build does not bring Triton.
        from megatron_hdpo.rollout.sglang.weights.tile_sums import tile_sums

        parameter = self._parameters.setdefault(key, _Parameter())
        if parameter.ended:
            raise ValueError(f"{key}: a piece after one that ended within a 32-bit word has no digest")
        num_bytes = piece.numel() * piece.itemsize + padding
        words = -(-num_bytes // WORD_BYTES)
        parameter.ended = words * WORD_BYTES > num_bytes
        if words:
            sums = tile_sums(as_words(piece), parameter.words, words, TILE_WORDS)
            parameter.parts.append((parameter.words // TILE_WORDS, self._rows, len(sums)))
            parameter.words += words
            self._sums.append(sums)
            self._rows += len(sums)

    def result(self) -> dict[Key, str]:
        """Return the digest of each parameter; waits for the GPU once."""
        sums = torch.cat(self._sums).cpu().numpy().view(np.uint32) if self._sums else np.zeros((0, 2), np.uint32)
        return {key: f"{_digest(parameter, sums):016x}" for key, parameter in self._parameters.items()}


def as_words(piece: Tensor) -> Tensor:
    """Return the bytes of a tensor as int32 words: [words], or [rows, words] with a stride between the rows.

    A view where the tensor's memory allows it; else a copy, padded with zeros to a whole word.
    """
    piece = piece.detach()
    per_word = WORD_BYTES // piece.itemsize if piece.itemsize < WORD_BYTES else 1
    has_rows = piece.dim() == 2 and piece.stride(1) == 1 and not piece.is_contiguous()
    if has_rows and _divides(per_word, piece.shape[1], piece.stride(0), piece.storage_offset()):
        return piece.view(torch.int32)
    flat = piece.contiguous().reshape(-1)
    if _divides(per_word, flat.numel(), flat.storage_offset()):
        return flat.view(torch.int32)
    raw = flat.view(torch.uint8)
    words = torch.zeros(-(-len(raw) // WORD_BYTES), dtype=torch.int32, device=raw.device)
    words.view(torch.uint8)[: len(raw)] = raw
    return words


def _divides(divisor: int, *numbers: int | torch.SymInt) -> bool:
    return not any(number % divisor for number in numbers)


def _digest(parameter: _Parameter, sums: NDArray[np.uint32]) -> int:
    """Return the 64-bit digest of a parameter from the rows [rows, 2] of all tiles' sums."""
    tiles = np.zeros((-(-parameter.words // TILE_WORDS), 2), np.uint32)
    for tile, row, rows in parameter.parts:
        tiles[tile : tile + rows] += sums[row : row + rows]
    mixed = _mix(tiles ^ np.uint32(parameter.words * WORD_BYTES & 0xFFFFFFFF)).astype(np.uint64)
    return _splitmix(int((mixed[:, 0] << np.uint64(32) | mixed[:, 1]).sum(dtype=np.uint64)))


def _mix(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Return the murmur finaliser of each 32-bit word, modulo 2^32."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def _splitmix(x: int) -> int:
    """Return the splitmix finaliser of a 64-bit word, modulo 2^64."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return x ^ (x >> 31)
