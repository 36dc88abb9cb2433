"""Check that weights are numbers before they are saved: a run that resumes from a NaN never gets rid of it."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_hdpo.parallel.context import ParallelContext


def weight_that_is_not_finite(sharded: dict[str, Any], context: ParallelContext) -> str:
    """Return the name, and a rank, of a weight with an infinite or undefined value; "" if there is none. Collective.

    sharded: state of a model as Megatron shards it. One host wait per rank, no copies.
    """
    weights = [value for value in nested_values(sharded) if _is_weight(value)]
    found = None
    if weights:
        norms = torch._foreach_norm([weight.data for weight in weights], math.inf)
        largest = torch.stack([norm.float() for norm in norms]).tolist()
        found = next((w.key for w, norm in zip(weights, largest, strict=True) if not math.isfinite(norm)), None)
    of_ranks = context.gather_objects(found)
    return next((f"{name} (rank {rank})" for rank, name in enumerate(of_ranks) if name is not None), "")


def _is_weight(value: Any) -> bool:
    if not isinstance(value, ShardedTensor | ShardedTensorFactory) or value.data is None:
        return False
    return value.data.is_floating_point() and value.data.numel() > 0
