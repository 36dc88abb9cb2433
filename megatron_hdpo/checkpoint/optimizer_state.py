"""The optimizer's state in a checkpoint: tied to the layout as each rank holds it, or by parameter for any layout."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer

from megatron_hdpo.model.offload import allocate_state, set_step

# The default: saved and loaded in parallel without gathering, and tied to the layout (but not to DP).
_TIED = {"distrib_optim_sharding_type": "dp_reshardable"}
# Stored under the names of the model's weights, which are the same at any layout.
_RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def sharded_optimizer(
    optimizer: ChainedOptimizer, model: dict[str, Any], reshardable: bool, loading: bool
) -> dict[Any, Any]:
    """Return the optimizer's sharded state for `dist_checkpointing` to write, or to fill when loading. Collective.

    model: the model's sharded state dict. reshardable: store it for any layout (see `_RESHARDABLE`).
    """
    _allocate_moments(optimizer)
    metadata = _RESHARDABLE if reshardable else _TIED
    state = optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
    return _of_any_layout(optimizer, state) if reshardable else state


def load_optimizer(optimizer: ChainedOptimizer, loaded: dict[Any, Any], reshardable: bool) -> None:
    """Load the filled state of `sharded_optimizer` into the optimizer.

    Hyper-parameters keep the values of the current recipe, even if it has changed since the checkpoint.
    """
    settings = _group_settings(optimizer)
    if reshardable:
        _load_from_any_layout(optimizer, loaded)
    else:
        optimizer.load_state_dict(loaded)
    _restore_step_counts(optimizer)
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)


def _of_any_layout(optimizer: ChainedOptimizer, state: dict[Any, Any]) -> dict[str, Any]:
    """Select from Megatron's sharded state what depends on no layout and no recipe: moments, main weights, the step."""
    parts = [state] if len(optimizer.chained_optimizers) == 1 else list(state.values())
    step = int(parts[0]["optimizer"]["param_groups"][0].get("step", 0))
    return {"step": step, "parts": {index: part["param_state"] for index, part in enumerate(parts)}}


def _load_from_any_layout(optimizer: ChainedOptimizer, loaded: dict[str, Any]) -> None:
    """Load the state selected by `_of_any_layout`, written at any layout.

    Experts have an optimizer of their own if they are spread over ranks, and none otherwise.
    """
    for index, part in enumerate(optimizer.chained_optimizers):
        own = part.state_dict()["optimizer"]
        for group in own["param_groups"]:
            group["step"] = loaded["step"]
        part.load_state_dict({"optimizer": own})
        if isinstance(part.optimizer, torch.optim.Adam):
            # Otherwise Megatron looks for each parameter's step in the checkpoint. `_restore_step_counts` sets them.
            for moments in part.optimizer.state.values():
                del moments["step"]
        part.load_parameter_state_from_fully_reshardable(loaded["parts"][index])
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            _own_memory(part.optimizer)


def _own_memory(optimizer: HybridDeviceOptimizer) -> None:
    """Copy the loaded slices to tensors of their own.

    The optimizer keeps the slices as they are, and each would keep the whole loaded tensor, with the parts of other
    replicas, in memory.
    """
    for moments in optimizer.state.values():
        for name, value in moments.items():
            if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() > value.nbytes:
                moments[name] = value.clone()


def _group_settings(optimizer: ChainedOptimizer) -> list[dict[str, Any]]:
    """Return the hyper-parameters of each parameter group that come from the recipe."""
    keys = ("max_lr", "min_lr", "betas", "eps")
    return [{key: group[key] for key in keys if key in group} for group in optimizer.param_groups]


def _allocate_moments(optimizer: ChainedOptimizer) -> None:
    """Allocate the state that Adam would allocate at its first step.

    Without it Megatron raises or leaves the state out of the checkpoint, and on loading there is nothing to read a
    checkpoint's moments into.
    """
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            allocate_state(part.optimizer)
        if part.optimizer.state:
            continue
        for parameter in (p for group in part.optimizer.param_groups for p in group["params"]):
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            if isinstance(part.optimizer, torch.optim.Adam):  # Transformer Engine's Adam counts steps by group
                moments["step"] = torch.zeros(())
            part.optimizer.state[parameter] = moments


def _restore_step_counts(optimizer: ChainedOptimizer) -> None:
    """Give each parameter of torch's Adam a step count of its own, from the count in its parameter group.

    After loading, Megatron shares one count tensor between all parameters, which then increases once per parameter.
    """
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            set_step(part.optimizer, int(part.optimizer.param_groups[0]["step"]))
        if not isinstance(part.optimizer, torch.optim.Adam):
            continue
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                part.optimizer.state[parameter]["step"] = torch.tensor(float(group["step"]))
