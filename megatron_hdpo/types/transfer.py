"""Copies between host and device that do not make the host wait.

A copy from or to ordinary (pageable) memory lets the host wait until the device has done all work before it. A copy
from or to pinned memory is queued like a kernel. On a CPU nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device through pinned memory; a tensor that is there already is returned as it is."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # torch keeps the pinned memory until the copy is over, and reuses it
    return tensor.to(device, non_blocking=True)


def join_to_device(arrays: Sequence[np.ndarray], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Copy arrays to the device in one transfer; returns a tensor of `dtype` for each, in its shape.

    The tensors are views of one buffer, which lives as long as any of them.
    """
    sizes = [array.size for array in arrays]
    edges = np.cumsum([0, *sizes])
    flat = torch.empty(int(edges[-1]), dtype=dtype, pin_memory=device.type == "cuda")
    values = flat.numpy()
    for array, (start, stop) in zip(arrays, pairwise(edges), strict=True):
        values[start:stop] = array.reshape(-1)
    parts = flat.to(device, non_blocking=True).split(sizes)
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def to_host(tensor: Tensor) -> Tensor:
    """Start the copy of a tensor to pinned host memory; its values are there after `wait_for_copies`.

    A tensor on the host is returned as it is.
    """
    return tensor.to("cpu", non_blocking=True)


def wait_for_copies(device: torch.device) -> None:
    """Wait until all copies that were started on the device's current stream are over."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
