"""A model's own parameters, matched with the slots of its architecture's table."""

from __future__ import annotations

from torch import nn

from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.model.chunks import unwrap
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.weights.errors import WeightsError, listed
from megatron_hdpo.weights.mapping import Shard, Slot, layers_of_stage, shard_of, stage_slots


def bind(
    model: nn.Module, architecture: Architecture, context: ParallelContext
) -> dict[Slot, tuple[nn.Parameter, Shard]]:
    """Every parameter of this rank with its slot and its part of it, in stream order.

    Raises WeightsError when a parameter has no slot, a slot no parameter, or their shapes differ.
    """
    tp, pp = context.groups.tp, context.groups.pp
    bare = unwrap(model)
    parameters = dict(bare.named_parameters())
    bound, missing, wrong = {}, [], _layer_mismatch(bare, layers_of_stage(architecture, pp.size(), pp.rank()))
    for slot in stage_slots(architecture, pp.size(), pp.rank()):
        name = next((name for name in slot.names if name in parameters), None)
        if name is None:
            missing.append(" or ".join(sorted(set(slot.names))))
            continue
        parameter, shard = parameters.pop(name), shard_of(architecture, slot, tp.size(), tp.rank())
        if tuple(parameter.shape) != shard.shape:
            wrong.append(f"{name}: {tuple(parameter.shape)}, the table says {shard.shape}")
        bound[slot] = (parameter, shard)
    lines = [
        *listed("the table expects, the model lacks", missing),
        *listed("the model has, the table does not know", parameters),
        *listed("different in the model", wrong),
    ]
    if lines:
        where = f"rank {context.rank} (TP {tp.rank()} of {tp.size()}, PP {pp.rank()} of {pp.size()})"
        raise WeightsError("\n".join([f"{where}: the model is not the {architecture.family} of the table", *lines]))
    return bound


def _layer_mismatch(model: nn.Module, expected: range) -> list[str]:
    """The table counts layers in equal stages; a model that was split otherwise must not be loaded by it."""
    numbers = [layer.layer_number - 1 for layer in model.decoder.layers]  # type: ignore[union-attr]
    return [] if numbers == list(expected) else [f"decoder layers: {numbers}, the table says {list(expected)}"]
