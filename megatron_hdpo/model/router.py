"""Metrics of how evenly the routers of a model with experts distribute the tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from megatron_hdpo.parallel.context import ParallelContext


class RouterStatistics:
    """Counters of the tokens that each expert gets while a model trains.

    Forward passes without gradient are not counted: neither scoring, nor the first of the two passes of a layer with
    activation recomputation. The few padding rows of each micro-batch are counted.
    """

    def __init__(self, model: nn.Module) -> None:
        """Count from now on. model: bare, under Megatron's DDP, or chunks; without experts there are no statistics."""
        self._routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
        self._counts: dict[int, Tensor] = {}
        for router in self._routers:
            router.register_forward_hook(self._count)

    def metrics(self, context: ParallelContext) -> dict[str, float]:
        """Compute the metrics of the tokens since the last call, the same on every rank. Collective over all ranks.

        `router/max_load`: tokens of a layer's busiest expert, divided by the number if all experts had equally many;
        `router/entropy`: entropy of the experts' shares, divided by that of equal shares (1: all equal, 0: one expert
        has all). They are means over layers; with `_worst` they are of the least even layer. Empty without tokens.
        """
        if not self._routers:
            return {}
        counts_LE = self._over_ranks(context)
        self._counts.clear()
        counts_LE = counts_LE[counts_LE.sum(dim=1) > 0]
        if not len(counts_LE):
            return {}
        shares_LE = counts_LE / counts_LE.sum(dim=1, keepdim=True)
        loads_L = shares_LE.max(dim=1).values * shares_LE.shape[1]
        uniform = torch.tensor(float(shares_LE.shape[1])).log()
        entropies_L = torch.special.entr(shares_LE).sum(dim=1) / uniform
        return {
            "router/max_load": float(loads_L.mean()),
            "router/max_load_worst": float(loads_L.max()),
            "router/entropy": float(entropies_L.mean()),
            "router/entropy_worst": float(entropies_L.min()),
        }

    def _count(self, router: TopKRouter, _: Any, output: tuple[Tensor, Tensor]) -> None:
        if not torch.is_grad_enabled():
            return
        tokens_E = output[1].detach().sum(dim=0)
        assert router.layer_number is not None
        layer = router.layer_number - 1
        self._counts[layer] = self._counts[layer] + tokens_E if layer in self._counts else tokens_E

    def _over_ranks(self, context: ParallelContext) -> Tensor:
        """Sum the tokens of every layer's experts over all ranks, float64 [layers, experts].

        No token is counted twice: the ranks of a stage have different tokens (tensor-parallel ranks too, because
        experts need sequence parallelism), and different stages have different layers.
        """
        config = self._routers[0].config
        total_LE = torch.zeros(config.num_layers, config.num_moe_experts, dtype=torch.float64)
        if self._counts:
            total_LE[list(self._counts)] = torch.stack(list(self._counts.values())).to("cpu", torch.float64)
        dist.all_reduce(total_LE, group=context.host)
        return total_LE
