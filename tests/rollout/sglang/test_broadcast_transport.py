"""A broadcast of weights that a server does not survive, or that never ends, costs the update and nothing else."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fault_proxy import cut_off, serving
from stand_in_server import StandIn
from torch import Tensor
from torch.distributed import distributed_c10d

from megatron_hdpo.rollout.sglang.config import SGLangConfig
from megatron_hdpo.rollout.sglang.engine import SGLangEngine
from megatron_hdpo.rollout.sglang.weights import transports
from megatron_hdpo.rollout.sglang.weights.push import WeightPush, WeightPushError
from megatron_hdpo.rollout.sglang.weights.transports import BroadcastTransport
from megatron_hdpo.rollout.sglang.weights.update_group import UpdateGroup
from megatron_hdpo.types.loop_thread import in_daemon_thread


class Group:
    """In place of the real one: a broadcast that ends when the group is abandoned, as NCCL's does, or at once."""

    name = "weights-test"
    made: list[Group]
    stuck = True
    abort_hangs = False
    error: Exception | None = None

    def __init__(self, members: dict[str, int], device: torch.device) -> None:
        self.members, self.offsets = members, dict.fromkeys(members, 1)
        self.abandoned, self.sent = threading.Event(), 0
        self.made.append(self)

    def invitation(self, offset: int) -> dict[str, Any]:
        return {"rank_offset": offset}

    def join(self, timeout_s: float) -> None:
        pass

    def broadcast(self, flat: Tensor, ready: object) -> None:
        if self.error is not None:
            raise self.error
        if self.stuck:
            assert self.abandoned.wait(60)
            raise RuntimeError("aborted")
        self.sent += 1

    def abandon(self) -> None:
        if self.abort_hangs:
            time.sleep(600)
        self.abandoned.set()


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> type[Group]:
    kind = type("ThisGroup", (Group,), {"made": []})
    monkeypatch.setattr(transports, "UpdateGroup", kind)
    return kind


@contextmanager
def pushing(timeout_s: float = 60.0) -> Iterator[tuple[SGLangEngine, WeightPush, StandIn]]:
    with serving(StandIn()) as server:
        config = SGLangConfig.model_validate(
            {"placement": "given", "urls": [server.url], "sync": {"bucket_mib": 1}, "health_interval_s": 0.2}
        )
        engine = SGLangEngine(config, [server.url], 17, 128)
        try:
            yield engine, WeightPush(engine, BroadcastTransport(timeout_s, torch.device("cpu")), None), server
        finally:
            engine.close()


def stream() -> Iterator[tuple[str, Tensor]]:
    for layer in range(3):
        yield f"model.layers.{layer}.input_layernorm.weight", torch.ones(2**18)


def seconds_of_a_failed_push(push: WeightPush, words: str) -> float:
    begin = time.monotonic()
    with pytest.raises(WeightPushError, match=words):
        push.push(stream(), 1)
    return time.monotonic() - begin


def test_a_server_that_is_lost_amid_a_broadcast_does_not_hold_the_trainer(group: type[Group]) -> None:
    with pushing() as (engine, push, server):
        server.faults["/update_weights_from_distributed"] = [cut_off()]
        assert seconds_of_a_failed_push(push, "no server took the weights") < 30
        assert [made.abandoned.is_set() for made in group.made] == [True]
        assert server.calls.count("/update_weights_from_distributed") == 0, "the other buckets are not announced"
        group.stuck = False
        push.push(stream(), 2)
        assert len(group.made) == 2 and group.made[1].sent == 3, "a new group, and every bucket"
        assert engine.replicas[0].state == "serving"


def test_a_broadcast_that_never_ends_is_given_up(group: type[Group]) -> None:
    """The server has answered: its part of the broadcast is enqueued, which does not mean that it took place."""
    with pushing(timeout_s=0.5) as (_, push, _server):
        assert seconds_of_a_failed_push(push, "did not end within 0.5 s") < 30
        assert group.made[0].abandoned.is_set()


def test_a_broadcast_that_fails_is_given_up(group: type[Group]) -> None:
    group.error = RuntimeError("remote process exited")
    with pushing() as (_, push, _server):
        seconds_of_a_failed_push(push, "RuntimeError: remote process exited")
        assert group.made[0].abandoned.is_set()


def test_an_abort_that_hangs_is_left_behind(group: type[Group], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transports, "ABANDON_S", 0.2)
    group.abort_hangs = True
    with pushing(timeout_s=0.3) as (_, push, _server):
        assert seconds_of_a_failed_push(push, "did not end within") < 30


def test_a_group_that_was_never_formed_is_not_used(group: type[Group], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Group, timeout_s: float) -> None:
        raise RuntimeError("no rendezvous")

    with pushing() as (_, push, _server):
        with monkeypatch.context() as patch:
            patch.setattr(group, "join", fails)
            seconds_of_a_failed_push(push, "no rendezvous")
        group.stuck = False
        push.push(stream(), 2)
        assert [made.sent for made in group.made] == [0, 3]


def test_torchs_watchdog_does_not_end_the_process_when_a_member_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch reads this variable when a group is created; other groups keep what the user has set."""
    variable, seen = "TORCH_NCCL_ASYNC_ERROR_HANDLING", []

    def create(*arguments: object, **options: object) -> tuple[str, None]:
        seen.append(os.environ.get(variable))
        return "a group", None

    monkeypatch.setattr(distributed_c10d, "_new_process_group_helper", create)
    for before in (None, "3"):
        if before is not None:
            monkeypatch.setenv(variable, before)
        group = UpdateGroup({"http://127.0.0.1:1": 1}, torch.device("cpu"))
        group.join(30.0)
        del distributed_c10d._world.pg_group_ranks[group._group]
        group._group = None
        group.abandon()
        assert os.environ.get(variable) == before
    assert seen == ["0", "0"]


def test_a_call_in_a_daemon_thread_gives_its_result_or_its_error() -> None:
    assert in_daemon_thread(lambda: 7).result(60) == 7
    with pytest.raises(ZeroDivisionError):
        in_daemon_thread(lambda: 1 // 0).result(60)
