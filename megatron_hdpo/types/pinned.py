"""Pinned host memory of exactly the size that is asked for.

torch's own allocator of pinned memory rounds every size up to a power of two and gives nothing back.
"""

from __future__ import annotations

import mmap
import weakref

import numpy as np
import torch
from torch import Tensor


class PinningError(RuntimeError):
    """Host memory cannot be pinned; the message has the size and CUDA's error."""


def host_buffer(size: int, device: torch.device) -> Tensor:
    """Allocate `size` bytes on the host, uint8 [size]; pinned for a CUDA device, and freed with the last tensor.

    Raises PinningError.
    """
    if device.type != "cuda" or not size:
        return torch.empty(size, dtype=torch.uint8)
    # Pages of its own, shared: a process that is forked later neither copies them nor takes them from the device.
    memory = np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8)
    address, runtime = memory.ctypes.data, torch.cuda.cudart()
    if error := int(runtime.cudaHostRegister(address, size, 0)):
        raise PinningError(f"{size / 2**30:.1f} GiB of host memory cannot be pinned (CUDA error {error})")
    # The array calls this before its memory is freed. At the end of the process CUDA may be gone already.
    weakref.finalize(memory, runtime.cudaHostUnregister, address).atexit = False
    return torch.from_numpy(memory)
