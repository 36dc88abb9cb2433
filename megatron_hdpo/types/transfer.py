"""Copies between host and device that do not make the host wait.

A copy from or to ordinary (pageable) memory lets the host wait until the device has done all work before it. A copy
from or to pinned memory is queued like a kernel. On a CPU nothing is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device through pinned memory; a tensor that is there already is returned as it is."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # torch keeps the pinned memory until the copy is over, and reuses it
    return tensor.to(device, non_blocking=True)
