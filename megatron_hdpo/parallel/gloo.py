"""Collectives of expert parallelism on gloo, where Megatron relies on features that only NCCL has.

The router decides how many tokens each rank sends, so the parts differ in size between ranks. On a CPU, Megatron passes
those sizes as integers that are no plain `int`, and ranks that share an expert exchange parts of unequal size.
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
    """Call torch's all_to_all_single with the split sizes as plain integers."""
    given = (output_split_sizes, input_split_sizes)
    output_sizes, input_sizes = (None if split is None else [int(n) for n in split] for split in given)
    return _all_to_all_single(output, input, output_sizes, input_sizes, **kwargs)


def all_gather(outputs: Sequence[Tensor], value: Tensor, group: Any = None, **kwargs: Any) -> Any:
    """Call torch's all_gather; parts of different sizes are broadcast one after the other."""
    if _same_shapes(outputs):
        return _all_gather(outputs, value, group=group, **kwargs)
    outputs[dist.get_rank(group)].copy_(value)
    for rank, part in enumerate(outputs):
        dist.broadcast(part, group=group, group_src=rank)


def reduce_scatter(output: Tensor, inputs: Sequence[Tensor], *, group: Any = None, **kwargs: Any) -> Any:
    """Call torch's reduce_scatter; parts of different sizes are reduced one after the other."""
    if _same_shapes(inputs):
        return _reduce_scatter(output, inputs, group=group, **kwargs)
    for rank, part in enumerate(inputs):
        total = part.clone()
        dist.reduce(total, group=group, group_dst=rank)
        if rank == dist.get_rank(group):
            output.copy_(total)


def _same_shapes(tensors: Sequence[Tensor]) -> bool:
    return len({tensor.shape for tensor in tensors}) == 1
