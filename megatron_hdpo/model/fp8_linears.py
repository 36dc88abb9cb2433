"""Megatron's parallel linear layers with emulated FP8 products, and the layers of the model that have them.

Scales see the same values as under Transformer Engine: with sequence parallelism those of the tensor-parallel group
together (inputs of column-parallel and gradients of row-parallel layers are gathered first), else those of the rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_hdpo.model.config import ModelConfig
from megatron_hdpo.model.fp8_emulation import RECIPES, Recipe, RecipeName, emulated_product


class _Emulated:
    """Mixin that computes the products of a Megatron linear layer in emulated FP8. recipe: its name."""

    def __init__(self, *args: Any, recipe: RecipeName, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recipe = RECIPES[recipe]

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **settings: Any) -> Tensor:
        return _linear(input, weight, bias, self.recipe, **settings)


class EmulatedColumnParallelLinear(_Emulated, ColumnParallelLinear):
    """ColumnParallelLinear with emulated FP8 products."""


class EmulatedRowParallelLinear(_Emulated, RowParallelLinear):
    """RowParallelLinear with emulated FP8 products."""


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    recipe: Recipe,
    *,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    tp_group: dist.ProcessGroup | None,
    **_: Any,
) -> Tensor:
    """Compute what Megatron's linear function computes; the collectives are those of its mappings."""
    if sequence_parallel:
        x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=tp_group)
    elif allreduce_dgrad:
        x = copy_to_tensor_model_parallel_region(x, group=tp_group)
    output = emulated_product(x, weight, recipe)
    return output if bias is None else output + bias


@dataclass(frozen=True)
class Linears:
    """What a layer spec names for the linear layers that split their outputs (column) and their inputs (row)."""

    column: type | ModuleSpec = ColumnParallelLinear
    row: type | ModuleSpec = RowParallelLinear


def linears_of(config: ModelConfig, layer: int, num_layers: int) -> Linears:
    """Return the linear layers of one of the model's layers, counted from 0: emulated, or Megatron's own."""
    start, end = config.first_last_layers_bf16
    if config.fp8_emulation is None or layer < start or layer >= num_layers - end:
        return Linears()
    params = {"recipe": config.fp8_emulation}
    return Linears(
        ModuleSpec(module=EmulatedColumnParallelLinear, params=params),
        ModuleSpec(module=EmulatedRowParallelLinear, params=params),
    )
