"""Run Megatron-Core unchanged on a CPU.

Megatron-Core names the CUDA device in some forty places. `MegatronOnCpu` answers those calls with the CPU while it is
entered, and restores everything on exit. It is entered only on CPU runs: a GPU run pays nothing and sees stock torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


def _names_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class MegatronOnCpu(TorchFunctionMode):
    """Within this context `device="cuda"`, `Tensor.cuda()`, `torch.cuda.current_device()` and friends mean the CPU.

    Tensor types answer as their CUDA counterparts ("torch.cuda.FloatTensor"), because Megatron's optimizer sorts
    parameters by that string.
    """

    def __init__(self) -> None:
        super().__init__()
        self._replaced: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> MegatronOnCpu:
        # A CPU run has no CUDA generator for activation recomputation to keep; the CPU's own is kept by its caller.
        stand_ins: list[tuple[Any, str, Callable[..., Any]]] = [
            (torch.cuda, "current_device", lambda: _CPU),
            (torch.cuda, "synchronize", lambda *args, **kwargs: None),
            (megatron_random, "_get_cuda_rng_state", lambda *args, **kwargs: None),
            (megatron_random, "_set_cuda_rng_state", lambda *args, **kwargs: None),
        ]
        self._replaced = [(module, name, getattr(module, name)) for module, name, _ in stand_ins]
        for module, name, stand_in in stand_ins:
            setattr(module, name, stand_in)
        super().__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        for module, name, original in self._replaced:
            setattr(module, name, original)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return func(*args, **kwargs)
