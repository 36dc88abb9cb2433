"""Matching of a model's parameters with the slots of its architecture's table."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.distributed as dist
from torch import nn

from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.model.chunks import chunks_of, unwrap
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.weights.errors import WeightsError, listed
from megatron_hdpo.weights.mapping import ParameterShard, Slot, layers_of_stage, shard_of, stage_slots

Bound = dict[Slot, tuple[nn.Parameter, ParameterShard]]


def bind(model: nn.Module, architecture: Architecture, context: ParallelContext) -> Bound:
    """Match every parameter of this rank with its slot, and return it with its shard, in stream order.

    Raises WeightsError when a parameter has no slot, a slot has no parameter, or their shapes differ.
    """
    bound: Bound = {}
    problems = _Problems()
    chunks = chunks_of(unwrap(model))
    for number, chunk in enumerate(chunks):
        stage = number * context.groups.pp.size() + context.groups.pp.rank()
        stages = len(chunks) * context.groups.pp.size()
        bound |= _bind_chunk(chunk, architecture, context, stages=stages, stage=stage, problems=problems)
    if lines := problems.lines():
        tp, pp = context.groups.tp, context.groups.pp
        where = f"rank {context.rank} (TP {tp.rank()} of {tp.size()}, PP {pp.rank()} of {pp.size()})"
        raise WeightsError("\n".join([f"{where}: the model is not the {architecture.family} of the table", *lines]))
    return bound


def sharing_group(slot: Slot, context: ParallelContext) -> dist.ProcessGroup:
    """Return the group of ranks, of this rank's stage, that together hold one copy of the slot."""
    return context.groups.tp_ep if slot.expert_ranks else context.groups.tp


@dataclass
class _Problems:
    """Differences between a model and its table."""

    missing: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return all differences as lines of text."""
        return [
            *listed("the table expects, the model lacks", self.missing),
            *listed("the model has, the table lacks", self.unknown),
            *listed("different in the model", self.wrong),
        ]


def _bind_chunk(
    chunk: nn.Module,
    architecture: Architecture,
    context: ParallelContext,
    *,
    stages: int,
    stage: int,
    problems: _Problems,
) -> Bound:
    bound: Bound = {}
    parameters = dict(chunk.named_parameters())
    problems.wrong += _layer_mismatch(chunk, layers_of_stage(architecture, stages, stage))
    for slot in stage_slots(architecture, stages, stage, context.layout.expert):
        name = next((name for name in slot.names if name in parameters), None)
        if name is None:
            problems.missing.append(" or ".join(sorted(set(slot.names))))
            continue
        group = sharing_group(slot, context)
        parameter, shard = parameters.pop(name), shard_of(architecture, slot, group.size(), group.rank())
        if tuple(parameter.shape) != shard.shape:
            problems.wrong.append(f"{name}: {tuple(parameter.shape)}, the table says {shard.shape}")
        bound[slot] = (parameter, shard)
    problems.unknown += parameters
    return bound


def _layer_mismatch(model: nn.Module, expected: range) -> list[str]:
    """Report a model whose stages are not equal: the table assumes equal stages and must not be used for it."""
    numbers = [layer.layer_number - 1 for layer in model.decoder.layers]  # type: ignore[union-attr]
    return [] if numbers == list(expected) else [f"decoder layers: {numbers}, the table says {list(expected)}"]
