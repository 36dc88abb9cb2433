"""A bucket of weights as one tensor, and as the text that a request to a server carries.

On a CPU the text holds the values. On a GPU it holds a handle to the trainer's memory (CUDA IPC), which the server's
process on the same GPU opens. torch names the GPU in a handle by its index, which is another one in a process that sees
other devices. SGLang replaces torch's function `rebuild_cuda_tensor` in its processes by one that also understands a
GPU's UUID, so a handle that names that function and a UUID needs nothing of SGLang here.
"""

from __future__ import annotations

import base64
import inspect
import io
import pickle
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

Bucket = list[tuple[str, Tensor]]
_DEVICE = list(inspect.signature(rebuild_cuda_tensor).parameters).index("storage_device")


def flattened(bucket: Bucket) -> tuple[Tensor, list[SimpleNamespace]]:
    """Return a bucket as one uint8 tensor, and the position of each tensor in it.

    The server reads only the attributes of the entries, so they need not be objects of its own class.
    """
    parts, metadata, start = [], [], 0
    for name, tensor in bucket:
        part = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        end = start + part.numel()
        metadata.append(
            SimpleNamespace(
                name=name, shape=tensor.shape, dtype=tensor.dtype, start_idx=start, end_idx=end, numel=part.numel()
            )
        )
        parts.append(part)
        start = end
    return torch.cat(parts), metadata


def request_text(flat: Tensor, metadata: list[SimpleNamespace]) -> str:
    """Return a flattened bucket as base64 text, for the field serialized_named_tensors of a request.

    The memory of a CUDA tensor must be kept until the server has answered.
    """
    buffer = io.BytesIO()
    # On a CPU plain pickling copies values; ForkingPickler would pass a file descriptor, which crashes the server.
    pickler = _HandlePickler(buffer) if flat.is_cuda else pickle.Pickler(buffer)
    pickler.dump({"flattened_tensor": flat, "metadata": metadata})
    return base64.b64encode(buffer.getvalue()).decode("ascii")


class _HandlePickler(pickle.Pickler):
    """Pickles CUDA tensors as handles that name their GPU by its UUID."""

    def reducer_override(self, value: Any) -> Any:
        """Return how to rebuild a tensor; see pickle.Pickler."""
        if not isinstance(value, Tensor):
            return NotImplemented
        rebuild, arguments = reduce_tensor(value)
        uuid = str(torch.cuda.get_device_properties(arguments[_DEVICE]).uuid)
        return rebuild, (*arguments[:_DEVICE], uuid, *arguments[_DEVICE + 1 :])
