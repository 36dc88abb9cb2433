"""Copies of this rank's shard of a model to host memory and back; frozen and snapshot teachers are kept there."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_hdpo.model.chunks import unwrap
from megatron_hdpo.weights.errors import WeightsError, listed

HostWeights = dict[str, Tensor]
"""Parameter name -> values on the host, of this rank's shard; pinned when the model is on CUDA."""


def copy_to_host(model: nn.Module, into: HostWeights | None = None) -> HostWeights:
    """Copy this rank's parameters to host memory; the model may be bare or wrapped in DDP. Not collective.

    into: an older copy of the same model whose memory is reused (pinning is slow).
    Raises WeightsError when `into` belongs to a different model.
    """
    parameters = dict(unwrap(model).named_parameters())
    if into is None:
        into = {
            name: torch.empty(p.shape, dtype=p.dtype, device="cpu", pin_memory=p.is_cuda)
            for name, p in parameters.items()
        }
    _check(parameters, into)
    with torch.no_grad():
        for name, parameter in parameters.items():
            into[name].copy_(parameter, non_blocking=True)
    _wait(parameters)
    return into


def load_from_host(model: nn.Module, state: HostWeights) -> None:
    """Write a host copy back into the parameters, in place. The main weights of an optimizer are not changed.

    Raises WeightsError, before anything is written, when names, shapes or types of the copy are not the model's.
    """
    parameters = dict(unwrap(model).named_parameters())
    _check(parameters, state)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name], non_blocking=True)
    _wait(parameters)


def _check(parameters: dict[str, nn.Parameter], state: HostWeights) -> None:
    wrong = [
        f"{name}: {tuple(state[name].shape)} {state[name].dtype}, the model has {tuple(p.shape)} {p.dtype}"
        for name, p in parameters.items()
        if name in state and (state[name].shape, state[name].dtype) != (p.shape, p.dtype)
    ]
    lines = [
        *listed("missing in the snapshot", parameters.keys() - state.keys()),
        *listed("unknown to the model", state.keys() - parameters.keys()),
        *listed("different", wrong),
    ]
    if lines:
        raise WeightsError("\n".join(["the snapshot is of another model or layout", *lines]))


def _wait(parameters: dict[str, nn.Parameter]) -> None:
    if any(parameter.is_cuda for parameter in parameters.values()):
        torch.cuda.synchronize()
