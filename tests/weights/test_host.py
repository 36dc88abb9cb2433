"""Copies in host memory: one buffer per type, moving averages bit for bit, files of older copies."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from megatron_hdpo.weights.errors import WeightsError
from megatron_hdpo.weights.host import HostWeights, average_into, copy_to_host, load_from_host


def model(seed: int = 0) -> nn.Module:
    """Layers of odd sizes in bfloat16, and one in float32 as a router has."""
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(37, 53), nn.Linear(53, 29)).to(torch.bfloat16)
    return nn.Sequential(layers, nn.Linear(29, 4, bias=False))


def step(layers: nn.Module) -> None:
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


def storages(copy: HostWeights) -> set[tuple[torch.dtype, int]]:
    return {(values.dtype, values.untyped_storage().data_ptr()) for values in copy.values()}


def equal(one: HostWeights, other: HostWeights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_copy_lies_in_one_buffer_per_type_and_comes_back() -> None:
    layers = model()
    start = {name: p.detach().clone() for name, p in layers.named_parameters()}
    copy = copy_to_host(layers)
    assert equal(copy, start) and list(copy) == list(start)
    found = storages(copy)
    assert {dtype for dtype, _ in found} == {torch.bfloat16, torch.float32} and len(found) == 2
    used = {values.untyped_storage().data_ptr(): values.untyped_storage().nbytes() for values in copy.values()}
    assert sum(used.values()) == sum(values.nbytes for values in copy.values())
    step(layers)
    assert copy_to_host(layers, into=copy) is copy and storages(copy) == found
    step(layers)
    load_from_host(layers, start)
    assert equal({name: p.detach() for name, p in layers.named_parameters()}, start)


def test_an_average_is_the_one_of_separate_tensors_bit_for_bit() -> None:
    layers, weight = model(), 1.0 - 0.95
    average = copy_to_host(layers, dtype=torch.float32)
    expected = {name: p.detach().to("cpu", torch.float32).clone() for name, p in layers.named_parameters()}
    for _ in range(5):
        step(layers)
        average_into(average, layers, weight)
        for name, parameter in layers.named_parameters():
            expected[name].lerp_(parameter.detach().to("cpu", torch.float32), weight)
    assert equal(average, expected) and len(storages(average)) == 1
    load_from_host(layers, average, convert=True)
    for name, parameter in layers.named_parameters():
        assert torch.equal(parameter, expected[name].to(parameter.dtype))


def test_a_file_has_the_size_of_the_values_and_reads_back() -> None:
    average, file = copy_to_host(model(), dtype=torch.float32), io.BytesIO()
    torch.save(average, file)
    assert len(file.getvalue()) < sum(values.nbytes for values in average.values()) + 4096
    file.seek(0)
    assert equal(torch.load(file, weights_only=True), average)


def test_an_average_of_another_model_is_refused() -> None:
    average = copy_to_host(model(), dtype=torch.float32)
    with pytest.raises(WeightsError, match="missing in the snapshot"):
        average_into(average, nn.Sequential(model(), nn.Linear(4, 4)), 0.5)
    with pytest.raises(WeightsError, match="different"):
        load_from_host(model(), average)
