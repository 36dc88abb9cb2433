"""Hugging Face -> Megatron -> Hugging Face, bit for bit, on every layout of up to four ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed_helper import run_ranks
from safetensors.torch import load_file
from tiny_checkpoints import CASES, build, layout, make_checkpoint

from megatron_hdpo.model.build import wrap_data_parallel
from megatron_hdpo.weights.load import load_hf
from megatron_hdpo.weights.mapping import tensors
from megatron_hdpo.weights.stream import stream_hf

TWO_CHUNKS = {"virtual_stages": 2}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    for case in CASES:
        make_checkpoint(case, folder / case)
    return {case: folder / case for case in CASES}


def _check_stream(path: Path, context, dtype: str, wrapped: bool, to: str, bucket_bytes: int) -> None:
    model, architecture = build(path, context, dtype)
    if wrapped:
        model = wrap_data_parallel(model, context)
    load_hf(model, architecture, context, path)
    received = list(stream_hf(model, architecture, context, to=to, bucket_bytes=bucket_bytes))
    if to == "leader" and context.rank != context.replica_ranks[0]:
        assert received == []
        return
    expected = load_file(path / "model.safetensors")
    assert [name for name, _ in received] == [tensor.name for tensor in tensors(architecture)]
    assert {name for name, _ in received} == expected.keys()
    for name, value in received:
        assert torch.equal(value, expected[name].to(value.dtype)), f"{path.name} {name}"


def _round_trips(checkpoints: dict[str, Path], layouts: list[tuple[int, int, dict[str, int]]]) -> None:
    for tensor, pipeline, rest in layouts:
        with layout(tensor, pipeline, **rest) as context:
            for index, path in enumerate(checkpoints.values()):
                wrapped, bucket = index % 2 == 0, (1, 10_000, 2**26)[index % 3]
                _check_stream(path, context, "float32", wrapped, "all", bucket)
                with context.megatron_calls():
                    _check_stream(path, context, "bfloat16", not wrapped, "leader", bucket)


def test_one_rank(checkpoints: dict[str, Path]) -> None:
    run_ranks(1, _round_trips, checkpoints, [(1, 1, {})])


def test_two_ranks(checkpoints: dict[str, Path]) -> None:
    run_ranks(2, _round_trips, checkpoints, [(2, 1, {}), (1, 2, {}), (1, 2, TWO_CHUNKS), (1, 1, {"context": 2})])


def test_four_ranks(checkpoints: dict[str, Path]) -> None:
    run_ranks(4, _round_trips, checkpoints, [(2, 2, TWO_CHUNKS), (1, 4, {}), (1, 2, {}), (1, 2, {"context": 2})])
