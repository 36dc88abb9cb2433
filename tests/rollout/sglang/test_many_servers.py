"""What is done for each of many servers is done side by side, once, and said in one line. With stand-ins."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
from fault_proxy import serving
from one_engine import one_engine, request
from stand_in_server import StandIn

from megatron_hdpo.rollout.sglang.api import ServerApi
from megatron_hdpo.rollout.sglang.replica import Replica, reasons
from megatron_hdpo.rollout.sglang.watch import Watch

DEADLINE_S = 60.0


@pytest.fixture
def servers() -> Iterator[list[StandIn]]:
    with ExitStack() as stack:
        yield [stack.enter_context(serving(StandIn())) for _ in range(3)]


def all_meet(monkeypatch: pytest.MonkeyPatch, call: str, count: int) -> None:
    """No call of this method of the servers' clients ends before so many have begun."""
    barrier, original = asyncio.Barrier(count), getattr(ServerApi, call)

    async def meeting(self: ServerApi, *arguments: Any) -> Any:
        await asyncio.wait_for(barrier.wait(), DEADLINE_S)
        return await original(self, *arguments)

    monkeypatch.setattr(ServerApi, call, meeting)


def test_servers_are_asked_for_their_properties_side_by_side(
    servers: list[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    all_meet(monkeypatch, "info", len(servers))
    with one_engine([server.url for server in servers], gate=False) as (engine, _):
        assert [replica.url for replica in engine.replicas] == [server.url for server in servers]
        assert [replica.index for replica in engine.replicas] == [0, 1, 2]


def test_servers_go_on_side_by_side_after_an_update(servers: list[StandIn], monkeypatch: pytest.MonkeyPatch) -> None:
    """One that hangs would hold up those behind it."""
    with one_engine([server.url for server in servers], gate=False) as (engine, push):
        all_meet(monkeypatch, "continue_generation", len(servers))
        engine.thread.run(push._continue_generation())
    assert all(server.calls == ["/continue_generation"] for server in servers)


def test_requests_that_fail_together_cost_one_look_at_their_server(servers: list[StandIn]) -> None:
    with one_engine([servers[0].url], gate=False, health_interval_s=600) as (engine, _):

        async def probes() -> None:
            await asyncio.gather(*(engine.watch.probe(engine.replicas[0]) for _ in range(20)))

        for turn in range(2):
            engine.thread.run(probes())
            assert len(servers[0].asked["/model_info"]) == turn + 1


def test_the_checks_of_servers_are_spread_over_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) % 3 == 0:
            raise asyncio.CancelledError

    async def check(self: Watch, replica: Replica, healthy_at: float) -> float:
        return healthy_at

    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(Watch, "_check_once", check)
    replicas = [SimpleNamespace(index=index) for index in range(4)]
    watch = Watch(SimpleNamespace(config=SimpleNamespace(health_interval_s=8.0), replicas=replicas))  # type: ignore[arg-type]
    for replica in replicas:
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(watch.run(replica))  # type: ignore[arg-type]
    assert pauses == [2.0, 8.0, 8.0, 4.0, 8.0, 8.0, 6.0, 8.0, 8.0, 8.0, 8.0, 8.0]


def test_a_server_that_cannot_stream_does_not_keep_others_from_it(servers: list[StandIn]) -> None:
    servers[0].info["incremental_streaming_output"] = True
    urls = [server.url for server in servers[:2]]
    for router, expected in ((None, [True, False]), (servers[2].url, [False, False])):
        with one_engine(urls, gate=False, router=router) as (engine, _):
            assert [engine._asking._streams(replica, request()) for replica in engine.replicas] == expected


def test_a_message_names_a_few_of_many_servers() -> None:
    many: list[Any] = [SimpleNamespace(url=f"http://{i}", reason="gone") for i in range(10)]
    assert reasons(many[:2]) == "http://0: gone; http://1: gone"
    assert reasons(many) == "; ".join(f"http://{i}: gone" for i in range(4)) + "; and 6 more"
