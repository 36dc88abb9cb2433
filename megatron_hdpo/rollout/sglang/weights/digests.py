"""Digests with which SGLang's weights_checker identifies the content of parameters, computed from a stream of pieces.

A server on a CPU hashes the bytes of a parameter (here), one on a GPU its 32-bit words (`word_digests.py`).
"""

from __future__ import annotations

import hashlib
from typing import Protocol

import torch
from torch import Tensor

from megatron_hdpo.rollout.sglang.weights.word_digests import Key, WordDigests


class Digests(Protocol):
    """Digests of many parameters. Pieces of different parameters may alternate; those of one come in their order."""

    def append(self, key: Key, piece: Tensor, padding: int = 0) -> None:
        """Append the bytes of a tensor, of any layout in memory, and `padding` zero bytes to a parameter."""

    def result(self) -> dict[Key, str]:
        """Return the digest of each parameter, 16 hexadecimal digits."""


class ByteDigests:
    """The first half of the SHA-256 of a parameter's bytes, as a server on a CPU computes it."""

    def __init__(self) -> None:
        self._hashes: dict[Key, hashlib._Hash] = {}

    def append(self, key: Key, piece: Tensor, padding: int = 0) -> None:
        """Append a piece to a parameter; see Digests."""
        content = self._hashes.setdefault(key, hashlib.sha256())
        content.update(piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        content.update(bytes(padding))

    def result(self) -> dict[Key, str]:
        """Return the digests; see Digests."""
        return {key: content.hexdigest()[:16] for key, content in self._hashes.items()}


def digests_of_servers(device: str) -> Digests:
    """Return the digests that servers on `device` (cpu or cuda) compute; those of cuda need the stream on a GPU."""
    return WordDigests() if device == "cuda" else ByteDigests()
