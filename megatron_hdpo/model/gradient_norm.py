"""The norm that gradients are clipped by, with one wait for the GPU.

Without Transformer Engine or Apex, Megatron's own copies the norm of every parameter to the host by itself.
"""

from __future__ import annotations

import math
from operator import methodcaller

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.utils import get_total_norm

# Megatron-Core 0.16 has the first name, 0.19 the second.
_NAMES = ("get_main_grads_for_grad_norm", "get_grads_for_grad_norm")
_gradients_of = methodcaller(next(name for name in _NAMES if hasattr(MegatronOptimizer, name)))


def gradient_norm(optimizer: ChainedOptimizer, device: torch.device) -> float:
    """Return the 2-norm of the gradients of all parameters, after `optimizer.prepare_grads`.

    Which gradients count on this rank, and the ranks whose parts are added, are the optimizer's own choice. Collective
    over those ranks.
    """
    by_group: dict[ProcessGroup, list[Tensor]] = {}
    for part in optimizer.chained_optimizers:
        by_group.setdefault(part.get_grad_stats_parallel_group(), []).extend(_gradients_of(part))
    squares = torch.stack([_sum_of_squares(gradients, group, device) for group, gradients in by_group.items()])
    norms = [square**0.5 for square in squares.tolist()]
    return norms[0] if len(norms) == 1 else math.sqrt(sum(norm**2 for norm in norms))


def _sum_of_squares(gradients: list[Tensor], group: ProcessGroup, device: torch.device) -> Tensor:
    square = get_total_norm(gradients).to(device) ** 2
    dist.all_reduce(square, group=group)
    return square
