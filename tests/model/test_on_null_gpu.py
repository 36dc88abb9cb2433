"""The plain-torch model on CUDA, seen on the null GPU: kernels of attention, its memory, host waits of a step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from host_waits import host_waits
from null_gpu import needs_null_gpu, on_null_gpu

SEQUENCES = (300, 77, 8192)
HEADS, KV_HEADS = 12, 2
QUADRATIC = ("softmax", "masked_fill")
"""Parts of the names of kernels that unfused attention has."""


def packed_attention(gpu: Any, cases: list[list[Any]]) -> list[dict[str, Any]]:
    """Kernels and peak memory of attention, forward and backward, over one rank's packed sequences, for each case."""
    import torch

    from megatron_hdpo.model.attention_kernels import attend
    from megatron_hdpo.model.packing import RowLayout, pack

    torch.backends.cuda.enable_cudnn_sdp(True)  # as in a run: elsewhere on the null GPU it is off
    device, found = torch.device("cuda", 0), []
    for context, head_dim, dtype in cases:
        sequences = [np.zeros(n, dtype=np.int32) for n in SEQUENCES]
        packed = pack(sequences, device, RowLayout(context=context, context_rank=context - 1))
        segments = packed.packed_seq_params().segments
        assert segments is not None
        options: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": device, "requires_grad": True}
        query = torch.zeros(sum(segments.queries), HEADS, head_dim, **options)
        key, value = (torch.zeros(sum(segments.keys), KV_HEADS, head_dim, **options) for _ in range(2))
        torch.cuda.reset_peak_memory_stats()
        with gpu.counted():
            attend(query, key, value, segments, None).sum().backward()
        launches = [count for count in gpu.counts() if count.kind in "KG"]
        found.append(
            {
                "names": [count.name for count in launches],
                "forward": sum(count.times for count in launches if "_fwd_" in count.name or "cutlassF" in count.name),
                "peak": torch.cuda.max_memory_allocated() / query.nbytes,
            }
        )
    return found


@pytest.mark.long
@needs_null_gpu
def test_packed_sequences_take_fused_kernels_without_plans_or_quadratic_tensors() -> None:
    """cuDNN's kernels build a plan for every shape, and those of a mask with grouped heads are not fused."""
    half = [[1, 64, "bfloat16"], [1, 128, "bfloat16"], [2, 64, "bfloat16"], [2, 128, "float16"]]
    single = [[1, 128, "float32"], [2, 128, "float32"]]
    found = on_null_gpu(packed_attention, [*half, *single])
    for case, (context, _, dtype) in zip(found, [*half, *single], strict=True):
        kernel = "cutlassF" if dtype == "float32" else "flash_fwd"
        assert any(kernel in name for name in case["names"])
        assert not any(part in name for part in QUADRATIC for name in case["names"])
        assert case["forward"] == (len(SEQUENCES) * context if dtype == "float32" else 1)
        assert case["peak"] < 20  # quadratic tensors would be 8,000 times the queries


def update(gpu: Any, model: str, layout: dict[str, Any], layers: int) -> dict[str, Any]:
    """Host waits of an optimizer step by place: from its first forward pass to its last backward pass, and apart."""
    import torch

    from megatron_hdpo.model import policy as module
    from megatron_hdpo.model.build import build_model, wrap_data_parallel
    from megatron_hdpo.model.config import ModelConfig, OptimizerConfig
    from megatron_hdpo.model.optimizer import build_optimizer
    from megatron_hdpo.parallel.context import start
    from megatron_hdpo.parallel.layout import ParallelConfig
    from megatron_hdpo.planner.shapes import SHAPES
    from megatron_hdpo.types.learning import DivergenceConfig, Example, LossSpec, SurrogateConfig
    from megatron_hdpo.types.rollouts import TopKArrays

    torch.backends.cuda.enable_cudnn_sdp(True)
    architecture = replace(SHAPES[model], num_layers=layers)
    context = start(ParallelConfig(**layout), "cuda")
    config = ModelConfig(path="", dtype="bfloat16", spec="torch")
    ddp = wrap_data_parallel(build_model(architecture, context, config), context)
    policy = module.Policy(architecture, context, ddp, 1024, *build_optimizer(OptimizerConfig(), ddp, context, 10))

    def example(length: int) -> Example:
        ids, ones = np.arange(length, dtype=np.int32), np.ones(length, dtype=np.float32)
        top = TopKArrays(np.tile(np.arange(8, dtype=np.int32), (length, 1)), np.full((length, 8), -5, np.float32))
        return Example(ids[:9], ids, ones, ones, float(length), distill_weights_T=ones, distill_count=1.0, target=top)

    examples = [example(length) for length in (900, 800, 700, 600)]  # one in each micro-batch
    spec = LossSpec(SurrogateConfig(), DivergenceConfig(top_k=8), temperature=1.0)
    policy.update(examples, spec)  # the first step compiles kernels
    real, inside = module.run_micro_batches, {}

    def run(*args: Any, **kwargs: Any) -> None:
        before, calls = dict(places), gpu.total("S")
        real(*args, **kwargs)
        inside["places"] = {place: n - before.get(place, 0) for place, n in places.items() if n > before.get(place, 0)}
        inside["calls"] = gpu.total("S") - calls

    module.run_micro_batches = run
    with host_waits() as places, gpu.counted():
        policy.update(examples, spec)
    return {**inside, "step": dict(places)}


LAYOUTS: dict[str, tuple[dict[str, Any], int, int]] = {
    "one rank": ({}, 0, 1),
    "stages": ({"tensor": 2, "pipeline": 2, "sequence": True}, 5, 8),
    "interleaved stages": ({"pipeline": 2, "virtual_stages": 2}, 1, 4),
    "shared sequences": ({"context": 2}, 0, 2),
}


@pytest.mark.long
@needs_null_gpu
@pytest.mark.parametrize("name", LAYOUTS)
def test_nothing_waits_for_the_gpu_between_the_first_forward_and_the_last_backward(name: str) -> None:
    layout, rank, world = LAYOUTS[name]
    found = on_null_gpu(update, "qwen2.5-1.5b", layout, 4, rank=rank, world=world)
    assert found["places"] == {} and found["calls"] == 0


@pytest.mark.long
@needs_null_gpu
def test_experts_train_without_transformer_engine_and_only_megatron_waits_for_their_token_counts() -> None:
    layout = {"tensor": 2, "expert": 2, "sequence": True}
    found = on_null_gpu(update, "qwen3-30b-a3b", layout, 2, rank=1, world=4)
    assert all(place.startswith("megatron/core/transformer/moe/") for place in found["places"])
