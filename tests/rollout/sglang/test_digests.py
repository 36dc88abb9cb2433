"""The trainer's checksums are those of SGLang: its CPU hash by hand, its GPU hash by its own kernels, interpreted."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from run_script import needs_triton, run_script
from word_digest_reference import RECORDED, SIZES, hashed_tensor, word_digest

from megatron_hdpo.rollout.sglang.servers.config import ServerConfig
from megatron_hdpo.rollout.sglang.weights.digests import ByteDigests, digests_of_servers
from megatron_hdpo.rollout.sglang.weights.word_digests import WordDigests

ROOT = Path(__file__).parents[3]
HELPERS = ROOT / "tests" / "helpers"


def of_bytes(*pieces: torch.Tensor, padding: int = 0) -> str:
    digests = ByteDigests()
    for piece in pieces:
        digests.append((0, "w"), piece, padding)
    return digests.result()[0, "w"]


def test_a_server_on_a_cpu_hashes_bytes() -> None:
    values = [1.5, -2.0, 0.0, 3.25]
    wanted = hashlib.sha256(struct.pack("<4f", *values)).hexdigest()[:16]
    assert of_bytes(torch.tensor(values)) == wanted
    assert of_bytes(torch.tensor(values).view(2, 2)) == wanted, "of bytes, not of shapes"
    assert of_bytes(torch.tensor(values[:1]), torch.tensor(values[1:])) == wanted, "of pieces as of the whole"
    half = hashlib.sha256(b"\xc0\x3f\x00\xc0").hexdigest()[:16]
    assert of_bytes(torch.tensor([1.5, -2.0], dtype=torch.bfloat16)) == half
    assert of_bytes(torch.tensor([1.5]), padding=2) == hashlib.sha256(struct.pack("<fh", 1.5, 0)).hexdigest()[:16]
    assert of_bytes(torch.empty(0)) == hashlib.sha256().hexdigest()[:16]


def test_layout_in_memory_does_not_matter_and_every_bit_does() -> None:
    tensor = torch.arange(20_000, dtype=torch.float32).view(100, 200)
    plain = of_bytes(tensor)
    assert of_bytes(tensor.T.contiguous().T) == plain and len(plain) == 16
    other = tensor.clone()
    other.view(torch.int32)[50, 100] ^= 1
    assert of_bytes(other) != plain
    assert of_bytes(tensor.flip(0)) != plain, "the place of a value counts"


def test_the_device_of_the_servers_decides() -> None:
    assert isinstance(digests_of_servers("cpu"), ByteDigests)
    assert isinstance(digests_of_servers("cuda"), WordDigests)


@pytest.mark.parametrize(("size", "recorded"), list(zip(SIZES, RECORDED, strict=True)))
def test_the_definition_of_a_gpus_digest(size: int, recorded: str) -> None:
    assert word_digest(hashed_tensor(size)) == recorded


def test_sglangs_own_kernels_follow_the_definition(sglang_config: ServerConfig) -> None:
    sizes = [3, 1023, 32771, 100_002]
    environment = os.environ | sglang_config.environment | {"TRITON_INTERPRET": "1"}
    script = HELPERS / "hash_in_interpreter.py"
    command = [sglang_config.interpreter, "-W", "ignore", script, *map(str, sizes)]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert answer.returncode == 0, answer.stderr
    hashes = answer.stdout.split()[-len(sizes) :]
    assert hashes == [word_digest(hashed_tensor(size)) for size in sizes]


@needs_triton
def test_the_kernel_follows_the_definition() -> None:
    assert "digests agree" in run_script("word_digests_in_interpreter.py", TRITON_INTERPRET="1")


@needs_triton
def test_the_kernel_compiles_for_hopper_with_wide_loads_and_without_spilling() -> None:
    assert "tile_sums_kernel" in run_script("tile_sums_ahead.py")
