"""Megatron's CUDA calls on a CPU: what they mean inside the context, and that nothing of it stays outside."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe import moe_utils

from megatron_hdpo.parallel.cpu import MegatronOnCpu

NAMES = [
    (torch.cuda, "current_device"),
    (torch.cuda, "synchronize"),
    (megatron_random, "_get_cuda_rng_state"),
    (megatron_random, "_set_cuda_rng_state"),
    *((torch.cuda, name) for name in ("Stream", "Event", "current_stream", "stream")),
    *((dist, name) for name in ("all_to_all_single", "all_gather", "reduce_scatter")),
    (moe_utils, "te_general_gemm"),
]
ABSENT = "no such name"


def _as_stock() -> list[object]:
    return [getattr(module, name, ABSENT) for module, name in NAMES] + [torch.Tensor.cuda, torch.Tensor.type]


def test_inside_cuda_is_the_cpu() -> None:
    x = torch.ones(2)
    with MegatronOnCpu():
        assert torch.zeros(1, device="cuda").device.type == "cpu"
        assert torch.zeros(1, device=torch.device("cuda", 3)).device.type == "cpu"
        assert torch.zeros(1, device=torch.cuda.current_device()).device.type == "cpu"
        assert torch.empty(1, device="cuda:0", pin_memory=True).device.type == "cpu"
        assert x.to(device="cuda").device.type == "cpu"
        assert x.cuda() is x
        assert x.type() == "torch.cuda.FloatTensor"
        assert x.type(torch.float64).dtype == torch.float64  # with an argument it converts, as ever
        torch.cuda.synchronize()


def test_inside_there_is_one_stream_and_nothing_to_wait_for() -> None:
    with MegatronOnCpu():
        side = torch.cuda.Stream(device="cuda")
        assert torch.cuda.current_stream() == side  # or Megatron would wait on it
        assert side != "another thing"
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            side.record_event().synchronize()
        torch.cuda.Event(enable_timing=True).synchronize()


def test_everything_is_restored() -> None:
    before = _as_stock()
    with MegatronOnCpu():
        assert torch.cuda.current_device() == torch.device("cpu")
    assert _as_stock() == before
    assert torch.ones(1).type() == "torch.FloatTensor"


def test_everything_is_restored_after_an_error() -> None:
    before = _as_stock()
    with pytest.raises(RuntimeError, match="on purpose"), MegatronOnCpu():
        raise RuntimeError("on purpose")
    assert _as_stock() == before
    assert torch.ones(1).type() == "torch.FloatTensor"


def test_one_inside_another() -> None:
    before = _as_stock()
    with MegatronOnCpu():
        with MegatronOnCpu():
            assert torch.zeros(1, device="cuda").device.type == "cpu"
        assert torch.zeros(1, device="cuda").device.type == "cpu"
        assert torch.cuda.current_device() == torch.device("cpu")
    assert _as_stock() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_outside_cuda_is_cuda() -> None:
    with MegatronOnCpu():
        pass
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
    with pytest.raises((AssertionError, RuntimeError)):
        torch.ones(1).cuda()


def test_recomputation_leaves_nothing_for_cuda_to_do_later() -> None:
    """Megatron's checkpoint sets a CUDA generator; on a machine without CUDA each call would wait in a queue."""
    waiting = len(torch.cuda._queued_calls)
    weight = torch.ones(3, requires_grad=True)
    with MegatronOnCpu():
        megatron_random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
        megatron_random.checkpoint(
            lambda x: (x * weight).sin(), False, torch.arange(3.0, requires_grad=True)
        ).sum().backward()
    torch.testing.assert_close(weight.grad, torch.arange(3.0) * torch.arange(3.0).cos())
    assert len(torch.cuda._queued_calls) == waiting
