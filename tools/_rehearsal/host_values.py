"""Values that decide shapes, and that a kernel or another rank would have computed: answered from what the host knows.

| value | answer |
|---|---|
| whether ranks hold equal copies | yes |
| tokens that the router sends to each expert | an even split: all experts get the same number, to one token |

The copies that read the values, and their waits, take place all the same and are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from torch import Tensor

from _rehearsal.device import NullGpu


@contextmanager
def answered(gpu: NullGpu) -> Iterator[None]:
    """Answer the values in the table above while the block runs."""
    dispatcher = token_dispatcher.MoEAlltoAllTokenDispatcher
    with ExitStack() as stack:

        def replace(owner: Any, name: str, made: Callable[[Any], Any]) -> None:
            stack.enter_context(patch.object(owner, name, made(getattr(owner, name))))

        replace(torch, "equal", lambda real: _equal(gpu, real))
        for module in (moe_utils, token_dispatcher):
            replace(module, "permute", lambda real: _permute(gpu, real))
        replace(dispatcher, "_maybe_dtoh_and_synchronize", _even_split)
        yield


def _equal(gpu: NullGpu, real: Callable[..., bool]) -> Callable[..., bool]:
    def equal(left: Tensor, right: Tensor) -> bool:
        with gpu.answering(*([b"\1"] if left.is_cuda else [])):
            return real(left, right)

    return equal


def _permute(gpu: NullGpu, real: Callable[..., Any]) -> Callable[..., Any]:
    def permute(tokens: Tensor, routing_map: Tensor, *rest: Any, num_out_tokens: int, **options: Any) -> Any:
        # Two selections of the routed places, and each one counts them first.
        count = np.int32(num_out_tokens).tobytes()
        with gpu.answering(count, count):
            return real(tokens, routing_map, *rest, num_out_tokens=num_out_tokens, **options)

    return permute


def _even_split(real: Callable[..., Any]) -> Callable[..., Any]:
    def move(self: Any, point: str, tokens_per_expert: Tensor | None = None) -> Any:
        moved = real(self, point, tokens_per_expert)
        if self.drop_and_pad or point != self.cuda_dtoh_point:
            return moved
        own = even_parts(int(self.num_out_tokens), self.num_experts).reshape(self.ep_size, -1)
        mine = own[self.ep_rank if hasattr(self, "ep_rank") else self.ep_group.rank()]
        if self.ep_size > 1 or self.tp_size > 1:
            self.input_splits = own.sum(axis=1)
            self.output_splits = np.full(self.ep_size, mine.sum())
            self.output_splits_tp = np.full(self.tp_size, mine.sum() * self.ep_size)
        if self.num_local_experts > 1:
            ranks = self.tp_size * self.ep_size
            self.num_global_tokens_per_local_expert = torch.from_numpy(np.tile(mine, (ranks, 1)))
        return torch.from_numpy(mine * (self.tp_size * self.ep_size))

    return move


def even_parts(total: int, parts: int) -> np.ndarray:
    """Return `parts` whole numbers that sum to `total` and differ by at most one; int64 [parts]."""
    return np.diff(np.arange(parts + 1) * total // parts)
