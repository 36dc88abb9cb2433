"""Trainer and colocated server take turns on a GPU: in which order memory changes hands, and what is checked."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from fault_proxy import serving, status
from stand_in_server import StandIn
from torch import Tensor

from megatron_hdpo.rollout.sglang.config import SGLangConfig
from megatron_hdpo.rollout.sglang.engine import SGLangEngine
from megatron_hdpo.rollout.sglang.shared_gpu import GIB, MemoryShortageError, SharedGpu
from megatron_hdpo.rollout.sglang.weights.push import WeightPush
from megatron_hdpo.rollout.sglang.weights.transports import TensorTransport

SERVER = {"weight": 14.0, "kvcache": 22.0}
SERVER_GIB = 36


class FakeMemory:
    """A GPU of 80 GiB. `calls` is the list in which the server notes its calls, too."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls
        self.tensors, self.cached, self.server = 20, 5, 0
        self.looks_until_free = 0

    def free(self) -> int:
        self.looks_until_free -= 1
        late = SERVER_GIB if self.looks_until_free > 0 else 0
        return (80 - self.tensors - self.cached - self.server - late) * GIB

    def in_use(self) -> int:
        return self.tensors * GIB

    def release_cached(self) -> None:
        self.calls.append("the trainer releases its cache")
        self.cached = 0

    def changed_by(self, call: str, asked: object = None) -> None:
        if call == "/release_memory_occupation":
            self.server = 0
        if call == "/resume_memory_occupation weights":
            assert self.free() >= 14 * GIB, "the server dies"
            self.server = 14
        if call == "/resume_memory_occupation kv_cache cuda_graph":
            assert self.free() >= 22 * GIB, "the server dies"
            self.server = 36


def stream() -> Iterator[tuple[str, Tensor]]:
    yield "model.norm.weight", torch.ones(4)


@contextmanager
def turns() -> Iterator[tuple[SGLangEngine, WeightPush, FakeMemory, StandIn]]:
    server = StandIn(SERVER)
    memory = FakeMemory(server.calls)
    memory.server, server.on_call = SERVER_GIB, memory.changed_by
    with serving(server):
        config = SGLangConfig.model_validate({"health_interval_s": 60, "servers": {"memory_saver": True}})
        shared = SharedGpu(memory, 0, lambda value: [value], release_timeout_s=0.2)
        engine = SGLangEngine(config, [server.url], 17, 128, shared_gpu=shared)
        try:
            yield engine, WeightPush(engine, TensorTransport(60.0), None), memory, server
        finally:
            engine.close()


def handovers(calls: list[str]) -> list[str]:
    return [call for call in calls if "memory" in call or "cache" in call or "update_weights" in call]


def test_the_trainer_returns_its_cache_before_the_server_takes_memory() -> None:
    with turns() as (engine, push, memory, server):
        push.push(stream(), 0)
        engine.make_room()
        memory.cached = 50  # the peak of the backward pass
        push.push(stream(), 1)
        assert handovers(server.calls) == [
            "the trainer releases its cache",
            "/update_weights_from_tensor",
            "the trainer releases its cache",
            "/release_memory_occupation",
            "the trainer releases its cache",
            "/resume_memory_occupation weights",
            "/update_weights_from_tensor",
            "the trainer releases its cache",
            "/resume_memory_occupation kv_cache cuda_graph",
        ]
        assert engine.replicas[0].state == "serving"


def test_memory_that_comes_late_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    with turns() as (engine, push, memory, server), caplog.at_level(logging.WARNING):
        push.push(stream(), 0)

        def late(call: str, asked: object) -> None:
            memory.changed_by(call)
            memory.looks_until_free = 3

        server.on_call = late
        engine.make_room()
        assert memory.looks_until_free == 0, "it looked until the memory was there"
        assert not caplog.records


def test_memory_that_never_comes_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with turns() as (engine, push, _, server), caplog.at_level(logging.WARNING):
        push.push(stream(), 0)
        server.on_call = lambda call, asked: None
        engine.make_room()
        (record,) = caplog.records
        assert "occupied 36.0 GiB of this GPU and has released 0.0 GiB within 0.2 s" in record.getMessage()


def test_a_server_that_cannot_wake_ends_the_run_before_it_dies() -> None:
    with turns() as (engine, push, memory, server):
        push.push(stream(), 0)
        engine.make_room()
        memory.tensors = 60
        read: list[str] = []
        with pytest.raises(MemoryShortageError, match="GiB to the trainer") as caught:
            push.push(((read.append(name), (name, tensor))[1] for name, tensor in stream()), 1)
        message = str(caught.value)
        assert (
            "released 36.0 GiB" in message
            and "20.0 GiB are free" in message
            and "occupy 60.0 GiB" in message
            and "mem_fraction_static" in message
        )
        assert not read and not any("resume_memory" in call for call in server.calls)


def test_a_server_that_was_restarted_has_its_memory_already() -> None:
    with turns() as (engine, push, memory, _):
        push.push(stream(), 0)
        engine.make_room()
        engine.replicas[0].asleep, memory.server, memory.tensors = False, SERVER_GIB, 40
        push.push(stream(), 1)
        assert engine.replicas[0].state == "serving"


def test_a_server_that_refuses_to_release_is_not_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    with turns() as (engine, push, _, server), caplog.at_level(logging.WARNING):
        push.push(stream(), 0)
        server.faults["/release_memory_occupation"] = [status(500)]
        engine.make_room()
        assert not [record for record in caplog.records if "GiB" in record.getMessage()]
        assert engine.replicas[0].state == "down"


def test_ranks_learn_of_a_shortage_on_another_gpu_and_of_their_owners_server() -> None:
    memory = FakeMemory([])
    answers = iter([[True, False, True], ["", "GPU 1 is full", "GPU 2 is full"]])
    with pytest.raises(MemoryShortageError, match=r"GPU 1 is full \(and 1 more GPUs\)"):
        SharedGpu(memory, 1, lambda value: next(answers)).give_back(False)
    assert memory.cached == 0
    memory.server = SERVER_GIB
    answers = iter([[None, None], [SERVER_GIB * GIB, 0]])

    def released(value: object) -> list[object]:
        memory.server = 0
        return next(answers)

    shared = SharedGpu(memory, 0, released, release_timeout_s=0.0)
    shared.receive(lambda: 0)
    memory.tensors = 50
    answers = iter([[True, False], ["", ""]])
    said: list[object] = []

    def shortage(value: object) -> list[object]:
        said.append(value)
        return next(answers)

    shared.gather = shortage
    shared.give_back(False)
    assert said[0] is False and "rank 0" in str(said[1]), "a rank without a server of its own watches its GPU"
