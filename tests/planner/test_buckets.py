"""Gradient buckets of the plan against those that Megatron's DDP makes."""

from __future__ import annotations

import dataclasses

import pytest
from distributed_helper import run_ranks
from tiny_policy import joined

from megatron_hdpo.costs.layout import Layout
from megatron_hdpo.costs.parameters import Buffer, stage_parameters
from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.model.build import build_model, wrap_data_parallel
from megatron_hdpo.model.config import ModelConfig

# Its embedding and head are larger than a bucket, two of its layers make one; memory that is not written costs nothing.
WIDE = Architecture("qwen2", 7, 512, 16384, 8, 2, 64, 90000, 4096, 1e-6, 1e4, None, True, False, False)
MIXTURE = dataclasses.replace(
    WIDE, family="qwen3_moe", qk_norm=True, qkv_bias=False, num_experts=4, experts_per_token=2, expert_ffn_size=8000
)


def buckets_of_megatron(architecture: Architecture, overlap: bool) -> list[list[int]]:
    """Values in each bucket of each buffer that Megatron's DDP makes on this rank."""
    with joined(overlap=overlap) as context:
        model = build_model(architecture, context, ModelConfig(path="", dtype="bfloat16", spec="torch"))
        return [[len(b.grad_data) for b in buffer.buckets] for buffer in wrap_data_parallel(model, context).buffers]


@pytest.mark.parametrize(
    ("architecture", "overlap"),
    [(WIDE, True), (WIDE, False), (dataclasses.replace(WIDE, tied=True), True), (MIXTURE, True)],
)
def test_buckets_are_those_of_megatron(architecture: Architecture, overlap: bool) -> None:
    (made,) = run_ranks(1, buckets_of_megatron, architecture, overlap)
    layout = Layout(overlap=overlap, spec="torch")
    planned = [list(buffer.bucket_values(layout)) for buffer in stage_parameters(architecture, layout, 0).buffers]
    assert planned == made
    assert (len(planned[0]) > 3) == overlap


def test_a_tied_embedding_of_a_pipeline_has_a_bucket_of_its_own() -> None:
    tied = dataclasses.replace(WIDE, tied=True, num_layers=8)
    first, last = (stage_parameters(tied, Layout(pipeline=2), stage).buffers[0] for stage in (0, 1))
    assert len(first.buckets) == len(last.buckets) == 2
    assert first.buckets[1] == last.buckets[0] == tied.padded_vocab_size(1) * tied.hidden_size


def test_only_the_first_stages_first_chunk_is_cut() -> None:
    layout = Layout(pipeline=2, virtual_stages=2, data=8, overlap=True)
    eight = dataclasses.replace(WIDE, num_layers=8)
    counts = [[len(buffer.buckets) for buffer in stage_parameters(eight, layout, stage).buffers] for stage in (0, 1)]
    assert counts[0][0] > 1 and counts[0][1:] == counts[1][:1] == counts[1][1:] == [1]


def test_many_replicas_have_larger_buckets() -> None:
    few, many = (stage_parameters(WIDE, Layout(data=data, overlap=True), 0).buffers[0] for data in (8, 128))
    assert isinstance(few, Buffer) and few.values == many.values
    assert len(few.buckets) > len(many.buckets) > 1
