"""A server that answers, and fails every sample: it costs nothing, is left alone, and is tried again."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from fault_proxy import FaultProxy, cut_off, delay, fault_proxy, status
from one_engine import TOLERANCE, Weights, collect, completions, one_engine, request
from server_tools import LiveServer, wait_until

from megatron_hdpo.rollout.engine import EngineLostWeights
from megatron_hdpo.rollout.sglang.dispatcher import ServersFail
from megatron_hdpo.rollout.sglang.engine import SGLangEngine
from megatron_hdpo.rollout.sglang.weights.push import WeightPushError
from megatron_hdpo.types import breaker
from megatron_hdpo.types.rollouts import GenerationRequest

VERSION, LIMIT = 1, 4


@contextmanager
def engine_of_two(
    sglang_server: LiveServer, weights: Weights, **settings: Any
) -> Iterator[tuple[SGLangEngine, FaultProxy, FaultProxy]]:
    """One server by two addresses, of which it got its weights by the first."""
    with fault_proxy(sglang_server.url) as first, fault_proxy(sglang_server.url) as second:
        with one_engine([first.url]) as (sender, push):
            push.push(weights.stream(VERSION), VERSION)
        settings = {"max_concurrency": LIMIT, "max_tries": 2} | settings
        with one_engine([first.url, second.url], **settings) as (engine, _):
            engine.stamp = sender.stamp  # the weights are its own
            engine.thread.run(engine.mark_served(engine.replicas, VERSION))
            yield engine, first, second


def batch(name: str) -> list[GenerationRequest]:
    """32 samples of 8 prompts."""
    return [request(f"{name}{i}#0", n=4, tokens=4, prompt=(2, 3, 4 + i)) for i in range(8)]


@pytest.mark.fault(
    "a server fails every sample",
    phase="sampling",
    seen="a warning, `servers/tripped`; it gets no samples for a while",
    lost="nothing",
)
def test_a_server_that_fails_every_sample_loses_none(
    sglang_server: LiveServer, weights: Weights, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(breaker, "FIRST_PAUSE_S", 600.0)
    with caplog.at_level(logging.WARNING), engine_of_two(sglang_server, weights) as (engine, bad, _):
        before = len(bad.asked.get("/generate", []))
        bad.faults["/generate"] = [status(500)] * 1000
        samples = completions(collect(engine, batch("p")))
        assert len(samples) == 32
        found_out = LIMIT + breaker.FAILURES - 1
        assert len(bad.asked["/generate"]) - before <= found_out, "what was under way when it was found out"
        found = engine.metrics()
        assert found["servers/tripped"] == 1 and found["servers/in_use"] == 1
        assert found["servers/failed_tries"] <= found_out
        assert engine.metrics()["servers/failed_tries"] == 0, "counted once"
    assert sum("gets no samples for a while" in line for line in caplog.messages) == 1


def test_it_is_tried_again_and_taken_back(
    sglang_server: LiveServer, weights: Weights, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(breaker, "FIRST_PAUSE_S", 0.2)
    with caplog.at_level(logging.WARNING), engine_of_two(sglang_server, weights) as (engine, bad, _):
        bad.faults["/generate"] = [status(500)] * 1000
        completions(collect(engine, batch("p")))
        assert wait_until(lambda: len(bad.faults["/generate"]) < 1000 - LIMIT - breaker.FAILURES), "it is tried"
        bad.faults["/generate"] = []
        assert wait_until(lambda: engine.replicas[0].breaker.state == "half_open")
        samples = completions(collect(engine, batch("q")))
        assert len(samples) == 32 and engine.replicas[0].breaker.state == "closed"
    assert sum("is well again" in line for line in caplog.messages) == 1


@pytest.mark.fault("all servers fail for a while", phase="sampling", seen="a warning; samples wait", lost="nothing")
def test_when_all_fail_for_a_while_samples_wait_for_them(
    sglang_server: LiveServer, weights: Weights, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(breaker, "FIRST_PAUSE_S", 0.1)
    with (
        caplog.at_level(logging.WARNING),
        engine_of_two(sglang_server, weights, max_tries=3) as (engine, first, second),
    ):
        for proxy in (first, second):
            proxy.faults["/generate"] = [status(500)] * (LIMIT + breaker.FAILURES)
        assert len(completions(collect(engine, batch("p")))) == 32
    assert any("every SGLang server fails its samples" in line for line in caplog.messages)


@pytest.mark.fault(
    "all servers fail for longer than `request_timeout_s`",
    phase="sampling",
    seen="one line with the reasons, exit code 2",
    lost="the steps since the last checkpoint",
)
def test_when_all_fail_for_too_long_the_run_ends(sglang_server: LiveServer, weights: Weights) -> None:
    with engine_of_two(sglang_server, weights, max_tries=8, request_timeout_s=1.0) as (engine, first, second):
        for proxy in (first, second):
            proxy.faults["/generate"] = [status(500)] * 1000
        with pytest.raises(ServersFail, match="status 500"):
            collect(engine, batch("p"))
        first.faults["/generate"] = second.faults["/generate"] = []
        assert not engine._tasks and not engine._outstanding


@pytest.mark.fault("a server closes idle connections", phase="weight update, sampling", seen="nothing", lost="nothing")
def test_a_connection_that_the_server_has_closed_is_opened_again(sglang_server: LiveServer, weights: Weights) -> None:
    """As it closes an idle one in the moment in which a request is sent."""
    with fault_proxy(sglang_server.url) as proxy, one_engine([proxy.url]) as (engine, push):
        push.push(weights.stream(VERSION), VERSION)
        for path in ("/pause_generation", "/update_weights_from_tensor", "/weights_checker"):
            proxy.faults[path] = [cut_off()]
        assert push.push(weights.stream(VERSION + 1), VERSION + 1).servers == 1
        (sample,) = completions(collect(engine, [request()]))
        assert weights.worst(request().prompt_ids, sample, VERSION + 1) < TOLERANCE
        proxy.faults["/pause_generation"] = [cut_off()] * 2
        with pytest.raises(WeightPushError, match="no server took the weights"):
            push.push(weights.stream(VERSION + 2), VERSION + 2)


def test_connections_are_given_up_before_the_server_does(sglang_server: LiveServer) -> None:
    with one_engine([sglang_server.url]) as (engine, _):
        assert engine._session is not None and engine._session.connector is not None
        assert engine._session.connector._keepalive_timeout < 5, "SGLANG_TIMEOUT_KEEP_ALIVE"  # type: ignore[attr-defined]


def test_requests_that_were_given_up_are_aborted_when_the_server_is_back(
    sglang_server: LiveServer, weights: Weights
) -> None:
    with fault_proxy(sglang_server.url) as proxy, one_engine([proxy.url], health_interval_s=0.3) as (engine, push):
        push.push(weights.stream(VERSION), VERSION)
        before = len(proxy.asked.get("/generate", []))
        proxy.faults["/generate"] = [delay(600.0)] * 3
        engine.submit([request(n=3)])
        assert wait_until(lambda: len(proxy.asked.get("/generate", [])) == before + 3)
        given_up = {body["rid"] for body in proxy.asked["/generate"][before:]}
        engine.thread.run(engine.watch.mark_down(engine.replicas[0], "a test"))
        assert wait_until(lambda: given_up <= {body["rid"] for body in proxy.asked.get("/abort_request", [])})
        assert not engine.replicas[0].abandoned
        with suppress(EngineLostWeights):  # unless the server was back before its samples had noticed
            list(engine.results())
