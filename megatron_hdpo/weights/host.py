"""Copies of this rank's shard of a model to host memory and back; teachers are kept there.

A copy lies in one buffer per type of value. It is pinned when the model is on CUDA, for fast transfers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megatron_hdpo.model.chunks import unwrap
from megatron_hdpo.types.pinned import PinningError, host_buffer
from megatron_hdpo.types.transfer import wait_for_copies
from megatron_hdpo.weights.errors import WeightsError, listed

HostWeights = dict[str, Tensor]
"""Parameter name -> values on the host, of this rank's shard; pinned when the model is on CUDA."""


def copy_to_host(model: nn.Module, into: HostWeights | None = None, dtype: torch.dtype | None = None) -> HostWeights:
    """Copy this rank's parameters to host memory; the model may be bare or wrapped in DDP. Not collective.

    into: an older copy of the same model whose memory is reused (pinning is slow). dtype: of a new copy; default: that
    of each parameter. Raises WeightsError when `into` belongs to a different model, or the memory cannot be pinned.
    """
    parameters = dict(unwrap(model).named_parameters())
    if into is None:
        into = _allocate({name: (p.shape, dtype or p.dtype) for name, p in parameters.items()}, _device(parameters))
    else:
        _check(parameters, into)
    with torch.no_grad():
        for name, parameter in parameters.items():
            into[name].copy_(parameter, non_blocking=True)
    wait_for_copies(_device(parameters))
    return into


def load_from_host(model: nn.Module, state: HostWeights, convert: bool = False) -> None:
    """Write a host copy back into the parameters, in place. The main weights of an optimizer are not changed.

    convert: values of another type than the parameter's are rounded to it, on the device.
    Raises WeightsError, before anything is written, when names, shapes or (unless `convert`) types of the copy are not
    the model's.
    """
    parameters = dict(unwrap(model).named_parameters())
    _check(parameters, state, types=not convert)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name], non_blocking=True)
    wait_for_copies(_device(parameters))


def average_into(average: HostWeights, model: nn.Module, weight: float) -> None:
    """Move an average on the host towards the model's parameters: average + weight * (parameter - average), in place.

    It is computed on the model's device in the type of the average, one parameter at a time.
    Raises WeightsError when the average belongs to a different model.
    """
    parameters = dict(unwrap(model).named_parameters())
    _check(parameters, average, types=False)
    with torch.no_grad():
        for name, parameter in parameters.items():
            held = average[name].to(parameter.device, non_blocking=True)
            average[name].copy_(held.lerp_(parameter.to(held.dtype), weight), non_blocking=True)
    wait_for_copies(_device(parameters))


def _allocate(shapes: Mapping[str, tuple[torch.Size, torch.dtype]], device: torch.device) -> HostWeights:
    """Allocate tensors in one buffer per type, pinned for a model on CUDA."""
    tensors: HostWeights = {}
    for dtype in dict.fromkeys(dtype for _, dtype in shapes.values()):
        own = {name: shape for name, (shape, kind) in shapes.items() if kind == dtype}
        sizes = [shape.numel() for shape in own.values()]
        parts = _buffer(sum(sizes) * dtype.itemsize, device).view(dtype).split(sizes)
        tensors |= {name: part.view(shape) for (name, shape), part in zip(own.items(), parts, strict=True)}
    return {name: tensors[name] for name in shapes}


def _buffer(size: int, device: torch.device) -> Tensor:
    """Allocate `size` bytes on the host, uint8; pinned for a model on CUDA. Raises WeightsError if that fails."""
    try:
        return host_buffer(size, device)
    except PinningError as error:
        raise WeightsError(
            f"for a copy of the weights {error}: free memory on this machine, or choose a teacher that needs no copy "
            "(teacher.kind=policy)"
        ) from error


def _device(parameters: Mapping[str, nn.Parameter]) -> torch.device:
    return next((parameter.device for parameter in parameters.values()), torch.device("cpu"))


def _check(parameters: Mapping[str, nn.Parameter], state: HostWeights, types: bool = True) -> None:
    wrong = [
        f"{name}: {tuple(state[name].shape)} {state[name].dtype}, the model has {tuple(p.shape)} {p.dtype}"
        for name, p in parameters.items()
        if name in state and (state[name].shape != p.shape or (types and state[name].dtype != p.dtype))
    ]
    lines = [
        *listed("missing in the snapshot", parameters.keys() - state.keys()),
        *listed("unknown to the model", state.keys() - parameters.keys()),
        *listed("different", wrong),
    ]
    if lines:
        raise WeightsError("\n".join(["the snapshot is of another model or layout", *lines]))
