"""The optimizer's part of a checkpoint: as each rank holds it, or parameter by parameter for any layout."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer

from megatron_hdpo.model.offload import allocate_state, set_step

# By default saved and loaded in parallel without gathering, and tied to its layout (not to DP).
_TIED = {"distrib_optim_sharding_type": "dp_reshardable"}
# Under the names that the model's weights have at any layout.
_RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def sharded_optimizer(
    optimizer: ChainedOptimizer, model: dict[str, Any], reshardable: bool, loading: bool
) -> dict[Any, Any]:
    """What `dist_checkpointing` is to write, or to fill. model: the model's sharded state. Collective."""
    _allocate_moments(optimizer)
    metadata = _RESHARDABLE if reshardable else _TIED
    state = optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
    return _of_any_layout(optimizer, state) if reshardable else state


def load_optimizer(optimizer: ChainedOptimizer, loaded: dict[Any, Any], reshardable: bool) -> None:
    """Take in what `sharded_optimizer` asked for. Hyper-parameters stay the recipe's, also where it changed since."""
    settings = _group_settings(optimizer)
    if reshardable:
        _load_from_any_layout(optimizer, loaded)
    else:
        optimizer.load_state_dict(loaded)
    _restore_step_counts(optimizer)
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)


def _of_any_layout(optimizer: ChainedOptimizer, state: dict[Any, Any]) -> dict[str, Any]:
    """Of Megatron's sharded state what no layout and no recipe decides: moments, main weights, the step."""
    parts = [state] if len(optimizer.chained_optimizers) == 1 else list(state.values())
    step = int(parts[0]["optimizer"]["param_groups"][0].get("step", 0))
    return {"step": step, "parts": {index: part["param_state"] for index, part in enumerate(parts)}}


def _load_from_any_layout(optimizer: ChainedOptimizer, loaded: dict[str, Any]) -> None:
    """Take in what `_of_any_layout` left, of any layout: experts have an optimizer of their own where they are spread
    over ranks, and none otherwise."""
    for index, part in enumerate(optimizer.chained_optimizers):
        own = part.state_dict()["optimizer"]
        for group in own["param_groups"]:
            group["step"] = loaded["step"]
        part.load_state_dict({"optimizer": own})
        if isinstance(part.optimizer, torch.optim.Adam):
            # Megatron would look for each parameter's step in the checkpoint; `_restore_step_counts` sets them.
            for moments in part.optimizer.state.values():
                del moments["step"]
        part.load_parameter_state_from_fully_reshardable(loaded["parts"][index])
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            _own_memory(part.optimizer)


def _own_memory(optimizer: HybridDeviceOptimizer) -> None:
    """It keeps the loaded slices themselves, which would keep what the other replicas hold in memory."""
    for moments in optimizer.state.values():
        for name, value in moments.items():
            if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() > value.nbytes:
                moments[name] = value.clone()


def _group_settings(optimizer: ChainedOptimizer) -> list[dict[str, Any]]:
    """What the recipe says of each parameter group."""
    keys = ("max_lr", "min_lr", "betas", "eps")
    return [{key: group[key] for key in keys if key in group} for group in optimizer.param_groups]


def _allocate_moments(optimizer: ChainedOptimizer) -> None:
    """What an Adam would make at its first step. Before that it has no state: Megatron stops there, or leaves it out of
    the checkpoint, and a checkpoint's moments are read into those that are there."""
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            allocate_state(part.optimizer)
        if part.optimizer.state:
            continue
        for parameter in (p for group in part.optimizer.param_groups for p in group["params"]):
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            if isinstance(part.optimizer, torch.optim.Adam):  # Transformer Engine's counts by group
                moments["step"] = torch.zeros(())
            part.optimizer.state[parameter] = moments


def _restore_step_counts(optimizer: ChainedOptimizer) -> None:
    """Megatron leaves all parameters of torch's Adam one tensor to count steps in, which then counts once for each of
    them. The right count is in the parameter groups."""
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            set_step(part.optimizer, int(part.optimizer.param_groups[0]["step"]))
        if not isinstance(part.optimizer, torch.optim.Adam):
            continue
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                part.optimizer.state[parameter]["step"] = torch.tensor(float(group["step"]))
