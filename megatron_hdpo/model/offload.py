"""Checkpoint helpers for Megatron's HybridDeviceOptimizer, which keeps and updates a share of its state on the host."""

from __future__ import annotations

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer


def allocate_state(optimizer: HybridDeviceOptimizer) -> None:
    """Allocate main weights and moments as they are before the first step, if there are none yet.

    It takes one step at learning rate 0 on gradients of 0, which changes no weight, and sets the step count back to 0.
    """
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
    """Set the step count of every sub-optimizer, in a separate tensor for each parameter (Megatron shares one).

    The count is removed from the groups of the outer optimizer, where loading a checkpoint leaves it: it would be
    copied to the sub-optimizers before every step.
    """
    for part in optimizer.sub_optimizers:
        for group in part.param_groups:
            if not isinstance(part, torch.optim.Adam):  # Transformer Engine's Adam counts steps by group
                group["step"] = step
                continue
            for parameter in group["params"]:
                part.state[parameter]["step"] = torch.tensor(float(step))
    for group in optimizer.param_groups:
        group.pop("step", None)
    optimizer._sync_sub_optimizers_state_to_hdo()
