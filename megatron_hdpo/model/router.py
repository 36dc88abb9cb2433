"""How evenly the routers of a model with experts share out its tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from megatron_hdpo.parallel.context import ParallelContext


class RouterStatistics:
    """Counts the tokens that each expert is given while a model trains.

    Forward passes that keep no gradient are not counted: neither scoring, nor the first of the two passes of a layer
    whose activations are recomputed. Rows that pad a micro-batch are, a few in each.
    """

    def __init__(self, model: nn.Module) -> None:
        """model: bare, under Megatron's DDP, or chunks; one without experts has no statistics."""
        self._routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
        self._counts: dict[int, Tensor] = {}
        for router in self._routers:
            router.register_forward_hook(self._count)

    def metrics(self, context: ParallelContext) -> dict[str, float]:
        """Of the tokens since the last call, over all ranks; the same on every rank. Collective over all ranks.

        `router/max_load`: tokens of a layer's busiest expert, over those that each would have if all had the same;
        `router/entropy`: entropy of the experts' shares over that of equal shares (1: all equal, 0: one has all).
        Means over layers, and with `_worst` those of the least even layer. Empty without tokens.
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
        """Tokens of every layer's experts, float64 [layers, experts]. The ranks of a stage have different tokens
        (tensor-parallel ones too: experts need sequence parallelism), those of different stages different layers."""
        config = self._routers[0].config
        total_LE = torch.zeros(config.num_layers, config.num_moe_experts, dtype=torch.float64)
        for layer, tokens_E in self._counts.items():
            total_LE[layer] = tokens_E
        dist.all_reduce(total_LE, group=context.host)
        return total_LE
