"""From a checkpoint to a policy that goes on as if it had never stopped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_hdpo.checkpoint.store import CheckpointStore
from megatron_hdpo.model.policy import Policy


def load_checkpoint(checkpoints: CheckpointStore, path: Path, policy: Policy) -> int:
    """Restore model, optimizer and schedule in place; returns the step. Raises CheckpointError when it does not fit.

    Megatron's distributed optimizer loads the state of its own fused Adam whole, that of torch's Adam not quite: before
    the first step there is none to load into, and afterwards all parameters share one step counter, which then counts
    every parameter's update (and starts from the made-up one). The number of updates is the schedule's.
    """
    _allocate_state(policy)
    with torch.no_grad():  # in float32 the main weights that are written are views of the model's own
        step = checkpoints.load(path, policy).step
    assert policy.schedule is not None
    for optimizer in _torch_optimizers(policy):
        for state in optimizer.optimizer.state.values():
            state["step"] = torch.tensor(float(policy.schedule.num_steps))
    return step


def _allocate_state(policy: Policy) -> None:
    """Moments to read the checkpoint's into; whatever else this changes is overwritten by the checkpoint too."""
    with policy.context.megatron_calls():
        for optimizer in _torch_optimizers(policy):
            optimizer._init_optimizer_states_with_dummy_values()


def _torch_optimizers(policy: Policy) -> Iterator[Any]:
    assert policy.optimizer is not None
    for optimizer in policy.optimizer.chained_optimizers:
        if isinstance(optimizer.optimizer, torch.optim.Adam | torch.optim.AdamW):
            yield optimizer
