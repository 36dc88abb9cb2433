"""An optimizer of which a share rests in host memory and steps there: Megatron's HybridDeviceOptimizer, and what a
checkpoint of it needs."""

from __future__ import annotations

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer


def allocate_state(optimizer: HybridDeviceOptimizer) -> None:
    """Main weights and moments as before the first step, where there is none yet: by a step at rate 0 on gradients of
    0, which changes nothing, and back to step 0."""
    if optimizer.state:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.decoupled_grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    set_step(optimizer, 0)


def set_step(optimizer: HybridDeviceOptimizer, step: int) -> None:
    """Let every part count its steps from here, each parameter by a tensor of its own (Megatron leaves one to all). A
    count in the whole's groups, which a checkpoint leaves there, would be given to the parts before every step."""
    for part in optimizer.sub_optimizers:
        for group in part.param_groups:
            if not isinstance(part, torch.optim.Adam):  # Transformer Engine's counts by group
                group["step"] = step
                continue
            for parameter in group["params"]:
                part.state[parameter]["step"] = torch.tensor(float(step))
    for group in optimizer.param_groups:
        group.pop("step", None)
    optimizer._sync_sub_optimizers_state_to_hdo()
