"""The trainer's checksums are those of SGLang: its CPU hash by hand, its GPU hash by its own kernels, interpreted."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_hdpo.rollout.sglang.servers.config import ServerConfig
from megatron_hdpo.rollout.sglang.weights.digests import digest

SIZES = [1, 4, 6, 1023, 32768, 32771, 70001, 300000]
"""Bytes: below a word, whole words, odd ends, one tile of 8192 words exactly, just beyond it, many tiles."""
# Of the sizes above, by the kernels of SGLang 0.5.23 in Triton's interpreter.
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


def hashed_tensor(size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)


def test_a_server_on_a_cpu_hashes_bytes() -> None:
    values = [1.5, -2.0, 0.0, 3.25]
    wanted = hashlib.sha256(struct.pack("<4f", *values)).hexdigest()[:16]
    assert digest(torch.tensor(values), "cpu") == wanted
    assert digest(torch.tensor(values).view(2, 2), "cpu") == wanted, "of bytes, not of shapes"
    half = hashlib.sha256(b"\xc0\x3f\x00\xc0").hexdigest()[:16]
    assert digest(torch.tensor([1.5, -2.0], dtype=torch.bfloat16), "cpu") == half


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_layout_in_memory_does_not_matter_and_every_bit_does(device: str) -> None:
    tensor = torch.arange(20_000, dtype=torch.float32).view(100, 200)
    plain = digest(tensor, device)
    assert digest(tensor.T.contiguous().T, device) == plain and len(plain) == 16
    for place in ((0, 0), (50, 100), (99, 199)):
        other = tensor.clone()
        other.view(torch.int32)[place] ^= 1
        assert digest(other, device) != plain, place
    swapped = tensor.clone()
    swapped[0, 0], swapped[99, 199] = tensor[99, 199], tensor[0, 0]
    assert digest(swapped, device) != plain, "the place of a value counts"


@pytest.mark.parametrize(("size", "recorded"), list(zip(SIZES, RECORDED, strict=True)))
def test_a_server_on_a_gpu_hashes_words(size: int, recorded: str) -> None:
    assert digest(hashed_tensor(size), "cuda") == recorded


def test_an_empty_tensor_has_a_digest() -> None:
    assert digest(torch.empty(0), "cuda") == "0" * 16
    assert digest(torch.empty(0), "cpu") == hashlib.sha256().hexdigest()[:16]


def test_sglangs_own_kernels_say_the_same(sglang_config: ServerConfig) -> None:
    sizes = [3, 1023, 32771, 100_002]
    script = Path(__file__).parents[2] / "helpers" / "hash_in_interpreter.py"
    environment = os.environ | sglang_config.environment | {"TRITON_INTERPRET": "1"}
    command = [sglang_config.interpreter, "-W", "ignore", script, *map(str, sizes)]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert answer.returncode == 0, answer.stderr
    hashes = answer.stdout.split()[-len(sizes) :]
    assert hashes == [digest(hashed_tensor(size), "cuda") for size in sizes]
