"""The null GPU: what torch sees of it, and what it counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from null_gpu import needs_null_gpu, on_null_gpu

GIB = 2**30


def look(gpu: Any) -> dict[str, Any]:
    """Everything in one process: its start costs more than what is done in it."""
    import torch
    import torch.distributed as dist

    from megatron_hdpo.parallel.context import start
    from megatron_hdpo.parallel.layout import ParallelConfig

    context = start(ParallelConfig(tensor=2, pipeline=2, sequence=True), "cuda")
    found: dict[str, Any] = {"name": torch.cuda.get_device_name(), "device": str(context.device)}
    found["replica"], found["tp"] = context.replica_ranks, dist.get_process_group_ranks(context.groups.tp)
    values = torch.ones(64, 64, device="cuda")
    with gpu.counted():
        dist.all_reduce(values, group=context.groups.tp)
        product = values @ values
        sent = torch.arange(5).cuda().tolist()
        (product.sum() > 3).item()
    names = gpu.communicators()
    found["sent"], found["flops"] = sent, gpu.flops()
    found["collectives"] = [(c.name, c.a, c.times) for c in gpu.counts() if c.kind == "N"]
    found["group"] = [names[c.b] for c in gpu.counts() if c.kind == "N"] == [context.groups.tp.group_name]
    found["waits"] = gpu.total("S")
    mask = torch.zeros(10, dtype=torch.bool, device="cuda")
    with gpu.answering(np.int32(7).tobytes()):
        found["selected"] = len(torch.arange(10, device="cuda").masked_select(mask))
    found["room"] = gpu.occupy(100 * GIB), gpu.occupy(100 * GIB)
    try:
        torch.empty(60 * GIB, dtype=torch.uint8, device="cuda")
    except torch.cuda.OutOfMemoryError as error:
        found["refused"] = "out of memory" in str(error)
    return found


@pytest.mark.long
@needs_null_gpu
def test_the_null_gpu_is_a_device_with_memory_that_counts() -> None:
    found = on_null_gpu(look, rank=5, world=16)
    assert found["name"] == "NVIDIA H200" and found["device"] == "cuda:5"
    assert found["replica"] == [4, 5, 12, 13] and found["tp"] == [4, 5]
    assert found["sent"] == [0, 1, 2, 3, 4]
    assert found["flops"] == 2 * 64**3
    assert found["collectives"] == [["AllReduce", 64 * 64 * 4, 1]] and found["group"]
    assert found["waits"] == 3  # a copy from and a copy to pageable memory, and .item()
    assert found["selected"] == 7
    assert found["room"] == [True, False] and found["refused"]
