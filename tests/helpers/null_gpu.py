"""Run a function as one rank of a world on the null GPU: a CUDA device that has memory and no arithmetic.

    from null_gpu import needs_null_gpu, on_null_gpu

    def waits(gpu: NullGpu, layout: dict[str, Any]) -> dict[str, int]:      # runs in a process of its own
        context = start(ParallelConfig(**layout), "cuda")                   # NCCL groups of 16 ranks; this is one
        ...
        with gpu.counted():
            policy.update(examples, spec)
        return {"waits": gpu.total("S"), "free": gpu.num_bytes("free")}     # JSON

    @pytest.mark.long
    @needs_null_gpu
    def test_an_update_does_not_wait_for_the_gpu() -> None:
        assert on_null_gpu(waits, {"tensor": 2, "sequence": True}, rank=1, world=16)["waits"] == 1

The process has torch's CUDA build from the environment that `make rehearsal-env` makes (another one: the variable
MEGATRON_HDPO_REHEARSAL names its folder); where there is none, the test is skipped. It is 20 seconds of CPU, most of
them imports: measure several things in one call. The function's module is imported there, so it may import pytest, the
package and tests/helpers, but nothing that only the development environment has.

On the device torch's checks, allocator, streams, NCCL groups and Triton's compiler are real. Values that kernels
compute are not: reading one gives zeros, reading what the host sent gives that. `NullGpu` (tools/_rehearsal/device.py)
tells launches, copies, waits, collectives and memory; `gpu.occupy` takes memory as another process would;
torch.cuda's own statistics and `set_sync_debug_mode` work as on a real device.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from _rehearsal.child import call
from _rehearsal.launch import interpreter

TESTS = Path(__file__).parents[1]


def built() -> bool:
    """Whether there is an environment with torch's CUDA build."""
    site = interpreter().parents[1] / "lib"
    return any(site.glob("python*/site-packages/torch/lib/libtorch_cuda.so"))


needs_null_gpu = pytest.mark.skipif(not built(), reason="no environment for rehearsals: make rehearsal-env")


def on_null_gpu(function: Callable[..., Any], *arguments: Any, rank: int = 0, world: int = 1, gpu: str = "h200") -> Any:
    """What `function(gpu, *arguments)` returns on the null GPU; JSON values only. gpu: h100 or h200."""
    beside = Path(function.__code__.co_filename).parent
    return call(function, arguments, rank=rank, world=world, gpu=gpu, folders=[TESTS / "helpers", beside])
