"""Collectives of experts on a CPU: gloo's, where Megatron asks for what only NCCL has.

Expert parallelism moves as many tokens as the router says, other numbers on every rank. Megatron names those numbers by
NumPy integers, which are tensors on a CPU, and lets ranks that share an expert exchange unequal parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

_all_to_all_single, _all_gather, _reduce_scatter = dist.all_to_all_single, dist.all_gather, dist.reduce_scatter


def all_to_all_single(
    output: Tensor,
    input: Tensor,
    output_split_sizes: Iterable[int] | None = None,
    input_split_sizes: Iterable[int] | None = None,
    **kwargs: Any,
) -> Any:
    """torch's, with the numbers of rows as plain integers."""
    sizes = (None if split is None else [int(n) for n in split] for split in (output_split_sizes, input_split_sizes))
    return _all_to_all_single(output, input, *sizes, **kwargs)


def all_gather(outputs: Sequence[Tensor], value: Tensor, group: Any = None, **kwargs: Any) -> Any:
    """torch's; parts of different sizes travel one after the other."""
    if _alike(outputs):
        return _all_gather(outputs, value, group=group, **kwargs)
    outputs[dist.get_rank(group)].copy_(value)
    for place, part in enumerate(outputs):
        dist.broadcast(part, group=group, group_src=place)


def reduce_scatter(output: Tensor, inputs: Sequence[Tensor], *, group: Any = None, **kwargs: Any) -> Any:
    """torch's; parts of different sizes are added up one after the other."""
    if _alike(inputs):
        return _reduce_scatter(output, inputs, group=group, **kwargs)
    for place, part in enumerate(inputs):
        total = part.clone()
        dist.reduce(total, group=group, group_dst=place)
        if place == dist.get_rank(group):
            output.copy_(total)


def _alike(tensors: Sequence[Tensor]) -> bool:
    return len({tensor.shape for tensor in tensors}) == 1
