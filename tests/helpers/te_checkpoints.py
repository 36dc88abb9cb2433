"""Checkpoints of policies with either layer spec, read by the other; run beside layer_specs.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_checkpoints import layout
from tiny_policy import OPTIMIZER, build_policy

from megatron_hdpo.checkpoint.store import CheckpointError, CheckpointStore
from megatron_hdpo.model.policy import Policy
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.weights.parameters import bind

SPECS = ("torch", "transformer_engine")
CASES = ("qwen3_tied", "qwen3_moe")


def read_by_the_other(checkpoints: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """What came of reading, by the writer's spec and the architecture."""
    seen: dict[str, dict[str, Any]] = {}
    with layout(2, 1, sequence=True) as context:
        for case in CASES:
            for writer, reader in (SPECS, SPECS[::-1]):
                place = folder / f"{case}_{writer}"
                seen[f"{writer} {case}"] = _read(checkpoints / case, place, context, writer, reader)
    return seen


def _policy(path: Path, context: ParallelContext, spec: str) -> Policy:
    return build_policy(path, context, optimizer=OPTIMIZER, model={"spec": spec})


def _read(path: Path, folder: Path, context: ParallelContext, writer: str, reader: str) -> dict[str, Any]:
    policy = _policy(path, context, writer)
    for main, state in _main_weights(policy):
        state |= {"exp_avg": 3 * main.detach(), "exp_avg_sq": main.detach().square()}
    found: dict[str, Any] = {}
    for reshardable in (False, True):
        store = CheckpointStore(folder / str(reshardable), context, keep=1, reshardable=reshardable)
        store.save(1, policy)
        other = _cleared(_policy(path, context, reader))
        try:
            store.load(store.latest(), other)
        except CheckpointError as error:
            found["refused"] = str(error)
    found["weights"] = _different(policy, other)
    found["wrong moments"] = sum(
        not torch.equal(state["exp_avg"], 3 * main) or not torch.equal(state["exp_avg_sq"], main.square())
        for main, state in _main_weights(other)
    )
    store.save_weights("teacher", policy.model)
    store.load_weights("teacher", _cleared(other).model)
    return found | {"teacher": _different(policy, other)}


def _main_weights(policy: Policy) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """This rank's slices of the fp32 weights, each with its state in the optimizer."""
    parts = [part.optimizer for part in policy.optimizer.chained_optimizers]
    return [(main, part.state[main]) for part in parts for group in part.param_groups for main in group["params"]]


def _cleared(policy: Policy) -> Policy:
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.fill_(float("nan"))
    return policy


def _different(one: Policy, other: Policy) -> list[str]:
    """The parameters whose values differ."""
    there = bind(other.model, other.architecture, other.context)
    here = bind(one.model, one.architecture, one.context)
    return [slot.names[0] for slot, (value, _) in here.items() if not torch.equal(value, there[slot][0])]
