"""Training state that leaves the device between steps changes no number, is really gone, and can be saved meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed_helper import run_ranks
from layout_cases import share
from tiny_policy import (
    OPTIMIZER,
    SPEC,
    build_policy,
    joined,
    make_checkpoint,
    make_examples,
    make_scorings,
    weights_of,
)

from megatron_hdpo.checkpoint.store import CheckpointStore
from megatron_hdpo.model.chunks import chunks_of
from megatron_hdpo.model.policy import Policy
from megatron_hdpo.model.trainer_memory import Leaving, TrainerMemory, TrainerMemoryError
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.types.pinned import PinningError

# name: layout on two ranks, model, precision.
CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "replicas": ({"overlap": True}, "llama", "bfloat16"),
    "float32": ({}, "llama", "float32"),
    "experts": ({"expert": 2}, "qwen3_moe", "bfloat16"),
    "chunks": ({"pipeline": 2, "virtual_stages": 2}, "llama", "bfloat16"),
}
STEPS = 3


def storages(policy: Policy) -> dict[str, int]:
    """Bytes on the device, by what they are."""
    buffers = [b for chunk in chunks_of(policy.ddp) for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    assert policy.optimizer is not None
    return {
        "gradients": sum(b.grad_data.untyped_storage().nbytes() for b in buffers),
        "weights": sum(b.param_data.untyped_storage().nbytes() for b in buffers),
        "parameters": sum(p.untyped_storage().nbytes() for p in policy.model.parameters()),
    }


def homes(policy: Policy) -> list[torch.UntypedStorage]:
    """The storages in which the optimizer has its state at home, apart from views of the weights."""
    assert policy.optimizer is not None
    weights = {p.untyped_storage()._cdata for p in policy.model.parameters()}
    tensors = [
        tensor
        for part in policy.optimizer.chained_optimizers
        for values in part.optimizer.state.values()
        for tensor in values.values()
    ]
    tensors += [
        p for part in policy.optimizer.chained_optimizers for g in part.optimizer.param_groups for p in g["params"]
    ]
    return [t.untyped_storage() for t in tensors if t.untyped_storage()._cdata not in weights]


def train(policy: Policy, steps: range, memory: TrainerMemory | None, store: CheckpointStore | None) -> dict[str, Any]:
    """Take steps; with `memory`, everything leaves after each one. The last state is saved while it is away."""
    found: dict[str, Any] = {"metrics": [], "away": []}
    for step in steps:
        found["metrics"].append(policy.update(share(policy, make_examples(step)), SPEC))
        if memory is None:
            continue
        at_home = homes(policy)
        memory.make_room(weights=False)
        after_first = storages(policy)
        memory.make_room(weights=True)
        found["away"].append((after_first, storages(policy), sum(s.nbytes() for s in at_home)))
        if store is not None and step == steps[-1]:
            store.save(step, policy)
        with pytest.raises(RuntimeError, match="belongs to the servers"):
            policy.score(make_scorings(0))
        memory.come_back()
    found["weights"] = weights_of(policy)
    return found


def run_case(name: str, path: Path, folder: Path) -> dict[str, Any]:
    layout, _, dtype = CASES[name]

    def policy_on(context: ParallelContext) -> Policy:
        return build_policy(path, context, optimizer=OPTIMIZER, dtype=dtype)

    found: dict[str, Any] = {}
    with joined(**layout) as context:
        found["stays"] = train(policy_on(context), range(STEPS), None, None)
        found["leaves optimizer"] = _moved(policy_on(context), "optimizer", None)
        for reshardable in (False, True):
            store = CheckpointStore(folder / f"{name}{reshardable}", context, keep=1, reshardable=reshardable)
            found["leaves all"] = _moved(policy_on(context), "all", store)
            resumed = policy_on(context)
            latest = store.latest()
            assert latest is not None
            store.load(latest, resumed)
            found[f"resumed {reshardable}"] = train(resumed, range(STEPS, STEPS + 1), None, None)
        longer = train(policy_on(context), range(STEPS + 1), None, None)
        found["longer"] = longer | {"metrics": longer["metrics"][STEPS:]}
    return found


def _moved(policy: Policy, leaving: Leaving, store: CheckpointStore | None) -> dict[str, Any]:
    return train(policy, range(STEPS), TrainerMemory(policy, leaving), store)


@pytest.fixture(scope="module", params=list(CASES))
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("memory")
    path = make_checkpoint(CASES[request.param][1], folder)
    return request.param, run_ranks(2, run_case, request.param, path, folder)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    weights = one["weights"]
    return one["metrics"] == other["metrics"] and all(
        np.array_equal(weights[name], other["weights"][name]) for name in weights
    )


def test_numbers_are_the_same_bit_for_bit(ranks: tuple[str, list[dict[str, Any]]]) -> None:
    for rank in ranks[1]:
        assert same(rank["stays"], rank["leaves optimizer"]) and same(rank["stays"], rank["leaves all"])


def test_a_checkpoint_saved_while_everything_is_away_resumes_bit_for_bit(
    ranks: tuple[str, list[dict[str, Any]]],
) -> None:
    for rank in ranks[1]:
        assert same(rank["resumed False"], rank["longer"]) and same(rank["resumed True"], rank["longer"])


def test_the_memory_is_free_meanwhile(ranks: tuple[str, list[dict[str, Any]]]) -> None:
    for rank in ranks[1]:
        assert len(rank["leaves all"]["away"]) == STEPS
        for first, second, state in rank["leaves all"]["away"]:
            assert first["gradients"] == 0 < first["weights"] and state == 0
            assert second["weights"] == second["parameters"] == 0
        for first, second, state in rank["leaves optimizer"]["away"]:
            assert second == first and second["gradients"] == state == 0 < second["parameters"]


def test_host_memory_that_cannot_be_pinned_is_said(tmp_path: Path) -> None:
    path = make_checkpoint("llama", tmp_path)
    (message,) = run_ranks(1, _refused, path)
    assert message.startswith("rollout.sglang.trainer_memory=all: 3.0 GiB") and message.endswith("set it to keep")


def _refused(path: Path) -> str:
    def refuse(*_: object) -> None:
        raise PinningError("3.0 GiB of host memory cannot be pinned (CUDA error 2)")

    with joined() as context, pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_hdpo.model.moved_storages.host_buffer", refuse)
        with pytest.raises(TrainerMemoryError) as caught:
            TrainerMemory(build_policy(path, context, optimizer=OPTIMIZER), "all").make_room(weights=True)
    return str(caught.value)
