"""Trainer and colocated server take turns on a GPU: in which order memory changes hands, and what is checked."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

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


class FakeTrainer:
    """Training state of 20 GiB, 8 of them weights, in place of TrainerMemory."""

    def __init__(self, memory: FakeMemory, leaving: str) -> None:
        self.memory, self.leaving = memory, leaving
        self.state_away = self.weights_away = False

    def weights_to_leave(self) -> int:
        return 0 if self.leaving == "optimizer" or self.weights_away else 8 * GIB

    def make_room(self, weights: bool) -> None:
        if not self.state_away:
            self.memory.calls.append("the trainer's memory: state leaves")
            self.memory.tensors -= 12
            self.state_away = True
        if weights and self.weights_to_leave():
            self.memory.calls.append("the trainer's memory: weights leave")
            self.memory.tensors -= 8
            self.weights_away = True

    def come_back(self) -> None:
        if self.state_away:
            self.memory.calls.append("the trainer's memory: comes back")
            self.memory.tensors = 20
            assert self.memory.free() >= 0, "the trainer dies"
        self.state_away = self.weights_away = False


@contextmanager
def turns(leaving: str = "keep") -> Iterator[tuple[SGLangEngine, WeightPush, FakeMemory, StandIn]]:
    server = StandIn(SERVER)
    memory = FakeMemory(server.calls)
    memory.server, server.on_call = SERVER_GIB, memory.changed_by
    with serving(server):
        config = SGLangConfig.model_validate({"health_interval_s": 60, "servers": {"memory_saver": True}})
        trainer = None if leaving == "keep" else cast(Any, FakeTrainer(memory, leaving))
        shared = SharedGpu(memory, 0, lambda value: [value], trainer, release_timeout_s=0.2)
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


def test_sleep_is_counted_until_the_weights_have_come() -> None:
    with turns() as (engine, push, _, _):
        push.push(stream(), 0)
        assert engine.metrics()["servers/asleep_s"] == 0
        engine.make_room()
        assert engine.metrics()["servers/asleep_s"] > 0
        push.push(stream(), 1)
        assert engine.metrics()["servers/asleep_s"] > 0
        assert engine.metrics()["servers/asleep_s"] == 0


CACHE = "the trainer releases its cache"
WAKE = ["/resume_memory_occupation weights", "/update_weights_from_tensor"]
TURNS = {
    "optimizer": ["the trainer's memory: state leaves", CACHE, *WAKE, CACHE],
    "all": ["the trainer's memory: state leaves", CACHE, *WAKE, "the trainer's memory: weights leave", CACHE],
}


@pytest.mark.parametrize("leaving", TURNS)
def test_the_trainers_state_leaves_before_servers_wake_and_its_weights_before_they_have_a_cache(leaving: str) -> None:
    with turns(leaving) as (engine, push, memory, server):
        engine.make_room()
        assert engine.replicas[0].asleep, "a server without weights sleeps, too"
        push.push(stream(), 0)
        engine.make_room()
        assert memory.tensors == 20
        server.calls.clear()
        memory.cached = 50
        push.push(stream(), 1)
        assert handovers(server.calls) == [*TURNS[leaving], "/resume_memory_occupation kv_cache cuda_graph"]
        assert memory.tensors == {"optimizer": 8, "all": 0}[leaving]
        server.calls.clear()
        engine.make_room()
        assert handovers(server.calls) == ["/release_memory_occupation", "the trainer's memory: comes back"]


def test_servers_sleep_again_before_weights_come_home_for_another_sync() -> None:
    """As when an engine has lost the weights: a sync reads them on the GPU."""
    with turns("all") as (engine, push, memory, server):
        push.push(stream(), 0)
        assert memory.tensors == 0
        server.calls.clear()
        push.push(stream(), 0)
        back = ["/release_memory_occupation", "the trainer's memory: comes back"]
        assert handovers(server.calls) == [*back, *TURNS["all"], "/resume_memory_occupation kv_cache cuda_graph"]
        assert engine.replicas[0].state == "serving" and memory.tensors == 0


def test_weights_that_are_about_to_leave_are_no_shortage() -> None:
    """A server of 66 GiB: with the trainer's weights only its own 14 must fit."""
    with turns("all") as (engine, push, memory, _):
        engine.make_room()
        push.engine.shared_gpu._received = 66 * GIB  # type: ignore[union-attr]
        memory.tensors = 20
        push.push(stream(), 1)
        assert engine.replicas[0].state == "serving"


class FakeServers:
    """A server of the run's own, whose process has ended; it comes back as it was."""

    def __init__(self, memory: FakeMemory, url: str) -> None:
        self.memory, self.restarts = memory, 0
        self.processes = [self]
        self.url, self.api_key, self.running = url, None, False

    def alive(self) -> bool:
        return self.running

    def exhausted(self, index: int) -> bool:
        return False

    def restart(self, index: int) -> None:
        self.restarts += 1
        self.memory.calls.append("the server's memory: it starts")
        assert self.memory.free() >= SERVER_GIB * GIB, "it would take less than it is to have"
        self.memory.server, self.running = SERVER_GIB, True

    def close(self) -> None:
        pass


@pytest.mark.parametrize("leaving", ["keep", "optimizer", "all"])
def test_a_server_that_dies_while_the_trainer_works_starts_when_its_memory_is_free(leaving: str) -> None:
    with turns(leaving) as (engine, push, memory, server):
        push.push(stream(), 0)
        servers = engine.servers = cast(Any, FakeServers(memory, server.url))
        replica = engine.replicas[0]
        replica.own = 0
        engine.make_room()
        memory.tensors, memory.cached = 40, 30
        engine.thread.run(engine.watch.mark_down(replica, "killed"))
        assert servers.restarts == 0, "the GPU is the trainer's"
        memory.tensors = 20
        server.calls.clear()
        push.push(stream(), 1)
        calls = handovers(server.calls)
        assert servers.restarts == 1 and calls.index("the server's memory: it starts") > calls.index(CACHE)
        assert replica.state == "serving" and memory.server == SERVER_GIB
        engine.thread.run(engine.watch.mark_down(replica, "killed"))
        assert servers.restarts <= 2, "while servers have the GPU it starts at once"
        engine.thread.run(engine.watch.wait_for_servers())
        assert servers.restarts == 2


def about_memory(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name.endswith(".shared_gpu")]


def test_memory_that_comes_late_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    with turns() as (engine, push, memory, server), caplog.at_level(logging.WARNING):
        push.push(stream(), 0)

        def late(call: str, asked: object) -> None:
            memory.changed_by(call)
            memory.looks_until_free = 3

        server.on_call = late
        engine.make_room()
        assert memory.looks_until_free == 0, "it looked until the memory was there"
        assert not about_memory(caplog)


def test_memory_that_never_comes_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with turns() as (engine, push, _, server), caplog.at_level(logging.WARNING):
        push.push(stream(), 0)
        server.on_call = lambda call, asked: None
        engine.make_room()
        (record,) = about_memory(caplog)
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
