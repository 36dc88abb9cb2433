"""Run Megatron-Core unchanged on a CPU.

Megatron-Core names the CUDA device in some forty places. While `MegatronOnCpu` is entered, those calls get the CPU
instead; on exit everything is restored. Only CPU runs enter it: a GPU run has no overhead and sees stock torch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe import moe_utils
from torch.overrides import TorchFunctionMode

from megatron_hdpo.parallel import gloo

_CPU = torch.device("cpu")
_ABSENT = object()


class _Stream:
    """No-op stand-in for CUDA streams and events: a CPU runs everything in order, so there is nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    __hash__ = None  # type: ignore[assignment]

    def wait_stream(self, *_: Any) -> None:
        """Return at once: there is no other stream."""

    def record_event(self, *_: Any) -> _Stream:
        """Return an event that has already completed."""
        return self

    def synchronize(self) -> None:
        """Return at once: all work is done."""


def _names_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class MegatronOnCpu(TorchFunctionMode):
    """Context in which `device="cuda"`, `Tensor.cuda()`, `torch.cuda.current_device()` and the like mean the CPU.

    `Tensor.type()` returns the name of the CUDA type ("torch.cuda.FloatTensor"), because Megatron's optimizer sorts
    parameters by that string.
    """

    def __init__(self) -> None:
        super().__init__()
        self._replaced: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> MegatronOnCpu:
        # Activation recomputation saves the CUDA generator's state, which a CPU run does not have. The state of the
        # CPU generator is saved by Megatron itself.
        stand_ins: list[tuple[Any, str, Any]] = [
            (torch.cuda, "current_device", lambda: _CPU),
            (torch.cuda, "synchronize", lambda *args, **kwargs: None),
            (torch.cuda, "Stream", _Stream),
            (torch.cuda, "Event", _Stream),
            (torch.cuda, "current_stream", _Stream),
            (torch.cuda, "stream", lambda stream: nullcontext()),
            *((dist, name, getattr(gloo, name)) for name in ("all_to_all_single", "all_gather", "reduce_scatter")),
            # No function of Transformer Engine's (see router_name.py).
            (moe_utils, "te_general_gemm", None),
            (megatron_random, "_get_cuda_rng_state", lambda *args, **kwargs: None),
            (megatron_random, "_set_cuda_rng_state", lambda *args, **kwargs: None),
        ]
        self._replaced = [(module, name, getattr(module, name, _ABSENT)) for module, name, _ in stand_ins]
        for module, name, stand_in in stand_ins:
            setattr(module, name, stand_in)
        super().__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        for module, name, original in self._replaced:
            if original is _ABSENT:
                delattr(module, name)
            else:
                setattr(module, name, original)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if not kwargs:  # the fast path: every attribute access of every tensor comes through here
            if func is torch.Tensor.type and len(args) == 1:
                return func(*args).replace("torch.", "torch.cuda.", 1)
            return func(*args)
        kwargs = dict(kwargs)
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return func(*args, **kwargs)
