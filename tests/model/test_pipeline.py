"""Micro-batches are made when they run; tensors between stages arrive as they were sent, in the shapes expected."""

from __future__ import annotations

import weakref
from collections import deque
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from distributed_helper import run_ranks
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel import p2p_communication
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import deallocate_output_tensor
from tiny_policy import (
    ONE_PER_MICRO_BATCH,
    OPTIMIZER,
    SPEC,
    build_policy,
    joined,
    make_checkpoint,
    make_examples,
    make_scorings,
)

from megatron_hdpo.model.pipeline import StageCommunicator, readers
from megatron_hdpo.model.policy import Policy

SHAPE = (24, 1, 512)


class Item:
    """Something that a weak reference can name."""


def test_readers_get_the_same_items_which_live_from_the_first_to_the_last_reader() -> None:
    alive: list[weakref.ref[Item]] = []

    def make() -> Item:
        item = Item()
        alive.append(weakref.ref(item))
        return item

    ahead, behind = readers([make] * 4, 2)
    assert alive == []
    first, second = id(next(ahead)), id(next(ahead))
    assert [ref() is not None for ref in alive] == [True, True]
    assert id(next(behind)) == first
    assert [ref() is not None for ref in alive] == [False, True]
    assert id(next(behind)) == second and len(list(behind)) == len(list(ahead)) == 2
    assert [ref() for ref in alive] == [None] * 4


@pytest.mark.parametrize("what", ["update", "score"])
@pytest.mark.parametrize("layout", ["one rank", "interleaved"])
def test_a_micro_batch_is_made_when_it_runs(what: str, layout: str, tmp_path: Path) -> None:
    """At no time are all inputs there, only those between their first and their last chunk of layers."""
    sizes = {"one rank": {}, "interleaved": {"pipeline": 2, "virtual_stages": 2}}[layout]
    for most, count in run_ranks(2 if sizes else 1, most_alive, make_checkpoint("llama", tmp_path), what, sizes):
        assert count >= 6 and most <= (4 if sizes else 2)


def most_alive(path: Path, what: str, sizes: dict[str, int]) -> tuple[int, int]:
    """Return the largest number of micro-batches that were there at a time, and their number."""
    with joined(**sizes) as context:
        policy = build_policy(path, context, budget=ONE_PER_MICRO_BATCH)
        seen: list[weakref.ref] = []
        most = 0
        name = {"update": "_training_work", "score": "_scoring_work"}[what]
        original = getattr(policy, name)

        def made(*arguments: object) -> object:
            nonlocal most
            work = original(*arguments)
            seen.append(weakref.ref(work.batch))
            most = max(most, sum(ref() is not None for ref in seen))
            return work

        setattr(policy, name, made)
        _run(policy, what)
        return most, len(seen)


def _run(policy: Policy, what: str) -> None:
    run = {
        "update": partial(policy.accumulate_gradients, make_examples(), SPEC),
        "score": partial(policy.score, make_scorings()),
    }
    run[what]()


def test_an_output_that_is_freed_while_it_is_sent_arrives_whole() -> None:
    sent, received = run_ranks(2, send_and_free, fresh=True)
    assert torch.equal(torch.tensor(received), torch.tensor(sent))


def send_and_free() -> list[float]:
    """Return what rank 0 sent, and what rank 1 received, which begins to receive after rank 0 has freed the output."""
    with joined(pipeline=2, virtual_stages=2) as context, context.megatron_calls():
        config = ModelParallelConfig(
            pipeline_model_parallel_size=2,
            virtual_pipeline_model_parallel_size=2,
            pipeline_dtype=torch.float32,
            overlap_p2p_comm=True,
            batch_p2p_comm=False,
            variable_seq_lengths=True,
        )
        communicator = StageCommunicator(context, config, deque([list(SHAPE)]), deque())
        store = dist.distributed_c10d._get_default_store()
        if context.rank == 0:
            return _send(communicator, store)
        original = p2p_communication._p2p_ops

        def receive_late(**arguments: object) -> object:
            store.wait(["freed"], timedelta(seconds=60))
            return original(**arguments)

        p2p_communication._p2p_ops = receive_late
        received, handles = communicator.send_forward_recv_forward(
            None, recv_prev=True, tensor_shape=SHAPE, overlap_p2p_comm=True
        )
        for handle in handles.values():
            handle.wait()
        return received.flatten().tolist()


def _send(communicator: StageCommunicator, store: dist.Store) -> list[float]:
    output = torch.arange(float(torch.Size(SHAPE).numel())).view(SHAPE).clone()
    sent = output.flatten().tolist()
    _, handles = communicator.send_forward_recv_forward(
        output, recv_prev=False, tensor_shape=SHAPE, overlap_p2p_comm=True
    )
    deallocate_output_tensor(output, deallocate_pipeline_outputs=True)
    others = [torch.full(SHAPE, -1.0) for _ in range(100)]  # one of them takes the storage that was freed
    store.set("freed", "")
    for handle in handles.values():
        handle.wait()
    assert all(bool((other == -1).all()) for other in others)
    return sent


def _no_exchange(*_: object) -> None:
    raise AssertionError("the shapes of a message are sent before it")


def norms_with_different_lengths(path: Path, layouts: list[dict[str, int]]) -> list[float]:
    """Return for each layout the norm of the gradients of micro-batches that all have different lengths."""
    norms = []
    with patch.object(P2PCommunicator, "_communicate_shapes", _no_exchange):
        for layout in layouts:
            with joined(**layout) as context:
                policy = build_policy(path, context, budget=ONE_PER_MICRO_BATCH, optimizer=OPTIMIZER)
                policy.score(make_scorings())
                norms.append(policy.update(make_examples(), SPEC)["train/grad_norm"])
    return norms


def test_a_stage_knows_the_shapes_that_arrive(tmp_path: Path) -> None:
    path = make_checkpoint("qwen2", tmp_path)
    (alone,) = run_ranks(1, norms_with_different_lengths, path, [{}])[0]
    for world, layouts in ((2, [{"pipeline": 2}, {"pipeline": 2, "virtual_stages": 2}]), (4, [{"pipeline": 4}])):
        for norms in run_ranks(world, norms_with_different_lengths, path, layouts):
            assert norms == pytest.approx([alone] * len(layouts), rel=1e-5)
