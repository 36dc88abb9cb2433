"""Samples whose request ended early go on from the tokens that had come, as if nothing had happened."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import aiohttp
import numpy as np
import pytest
from aiohttp import web
from fault_proxy import Answer, FaultProxy, changed, cut_off, delay, streamed_until
from one_engine import TOLERANCE, Weights, collect, completions, kept_away, one_engine, request

from megatron_hdpo.rollout.engine import EngineLostWeights
from megatron_hdpo.rollout.sglang.engine import SGLangEngine
from megatron_hdpo.types.rollouts import Completion, GenerationRequest

VERSION, INTERVAL, TOKENS = 1, 8, 100


def greedy(tokens: int = TOKENS, **settings: Any) -> GenerationRequest:
    return request(tokens=tokens, temperature=0.0, **settings)


async def cut(request: web.Request, proxy: FaultProxy, asked: Answer) -> bool:
    return False


async def stall(request: web.Request, proxy: FaultProxy, asked: Answer) -> bool:
    await delay(600.0)(request, proxy)
    return False


async def abort(request: web.Request, proxy: FaultProxy, asked: Answer) -> bool:
    """As an operator, or another client, may."""
    async with aiohttp.ClientSession() as session:
        await (await session.post(f"{proxy.target}/abort_request", json={"rid": asked["rid"]})).read()
    return True


def one(engine: SGLangEngine, wanted: GenerationRequest) -> Completion:
    (sample,) = completions(collect(engine, [wanted]))
    return sample


def check_equal(found: Completion, whole: Completion) -> None:
    assert found.token_ids.tolist() == whole.token_ids.tolist()
    assert found.finish_reason == whole.finish_reason
    np.testing.assert_allclose(found.logprobs, whole.logprobs, atol=TOLERANCE)
    assert found.weight_versions.tolist() == whole.weight_versions.tolist()


@pytest.mark.fault(
    "a connection breaks amid an answer, twice", phase="sampling", seen="`servers/continued`", lost="nothing"
)
def test_a_sample_whose_server_is_lost_is_the_one_that_would_have_come(proxy: FaultProxy, weights: Weights) -> None:
    """Twice in one sample, and with a single try: a try that brought tokens does not count."""
    with one_engine([proxy.url], stream_interval=INTERVAL, max_tries=1) as (engine, push):
        push.push(weights.stream(VERSION), VERSION)
        whole = one(engine, greedy())
        engine.metrics()
        before = len(proxy.asked["/generate"])
        proxy.faults["/generate"] = [streamed_until(3, cut), streamed_until(2, cut)]
        found = one(engine, greedy())
        first, second, third = proxy.asked["/generate"][before:]
        counted = engine.metrics()
    check_equal(found, whole)
    assert weights.worst(request().prompt_ids, found, VERSION) < TOLERANCE
    prompt = request().prompt_ids.tolist()
    parts = [len(body["input_ids"]) - len(prompt) for body in (first, second, third)]
    assert parts[0] == 0 < parts[1] < parts[2] < TOKENS
    for body, part in zip((first, second, third), parts, strict=True):
        assert body["input_ids"] == prompt + whole.token_ids[:part].tolist()
        assert body["sampling_params"]["max_new_tokens"] == TOKENS - part
    assert counted["servers/continued"] == 1 and counted["servers/kept_tokens"] == parts[2]
    assert counted["servers/failed_tries"] == 2 and counted["servers/lost_tokens"] == 0


def test_a_continued_sample_stops_where_it_would_have(proxy: FaultProxy, weights: Weights) -> None:
    with one_engine([proxy.url], stream_interval=INTERVAL) as (engine, push):
        push.push(weights.stream(VERSION), VERSION)
        ids = one(engine, greedy()).token_ids.tolist()
        stops = (1, next(token for token in ids if token != ids[0]))  # 1 ends a response of this model anyway
        whole = one(engine, greedy(stop_token_ids=stops))
        assert whole.finish_reason == "stop" and 2 <= len(whole.token_ids) < TOKENS, whole.token_ids
        proxy.faults["/generate"] = [streamed_until(1, cut)]
        check_equal(one(engine, greedy(stop_token_ids=stops)), whole)
        assert engine.metrics()["servers/continued"] == 1


@pytest.mark.fault(
    "an answer stalls for longer than `request_timeout_s`",
    phase="sampling",
    seen="`servers/continued`; the request is aborted on its server",
    lost="nothing",
)
def test_a_request_past_its_deadline_is_continued(proxy: FaultProxy, weights: Weights) -> None:
    """On a busy machine requests that nobody delays may pass it, too, and are continued as well."""
    with one_engine([proxy.url], stream_interval=INTERVAL, request_timeout_s=10.0, max_tries=1) as (engine, push):
        push.push(weights.stream(VERSION), VERSION)
        whole = one(engine, greedy())
        engine.metrics()
        before = len(proxy.asked["/generate"])
        proxy.faults["/generate"] = [streamed_until(3, stall)]
        check_equal(one(engine, greedy()), whole)
        assert engine.metrics()["servers/continued"] == 1
        stalled = proxy.asked["/generate"][before]["rid"]
        assert [body["rid"] for body in proxy.asked["/abort_request"]].count(stalled) == 1


def continued(
    engine: SGLangEngine, proxy: FaultProxy, fault: Callable[[], Any], wanted: GenerationRequest
) -> Completion:
    """A sample that was continued. How fast the server is decides whether an abort comes before the end: it is tried
    until it does."""
    engine.metrics()
    for _ in range(20):
        proxy.faults["/generate"] = [fault()]
        sample = one(engine, wanted)
        if engine.metrics()["servers/continued"]:
            return sample
    raise AssertionError("no abort of 20 came before the end of the sample")


@pytest.mark.fault("a server aborts a request", phase="sampling", seen="`servers/continued`", lost="nothing")
def test_a_streamed_sample_that_is_aborted_is_continued(proxy: FaultProxy, weights: Weights) -> None:
    with one_engine([proxy.url], stream_interval=INTERVAL) as (engine, push):
        push.push(weights.stream(VERSION), VERSION)
        whole = one(engine, greedy())
        check_equal(continued(engine, proxy, lambda: streamed_until(2, abort), greedy()), whole)


def test_top_log_probs_of_an_aborted_sample_are_kept(proxy: FaultProxy, weights: Weights) -> None:
    """Requests for them are not streamed: the server's answer to the abort holds what there was."""

    def aborted_later() -> Any:
        async def fault(request: web.Request, proxy: FaultProxy) -> web.StreamResponse:
            body = await request.read()
            answer = asyncio.create_task(proxy.forward(request, body))
            await asyncio.sleep(0.15)
            await abort(request, proxy, proxy.asked["/generate"][-1])
            return await answer

        return fault

    wanted = greedy(top_logprobs=4)
    with one_engine([proxy.url]) as (engine, push):
        push.push(weights.stream(VERSION), VERSION)
        whole = one(engine, wanted)
        found = continued(engine, proxy, aborted_later, wanted)
    check_equal(found, whole)
    assert found.top_logprobs is not None and whole.top_logprobs is not None
    assert len(found.top_logprobs.ids_TK) == TOKENS
    np.testing.assert_allclose(found.top_logprobs.logprobs_TK, whole.top_logprobs.logprobs_TK, atol=TOLERANCE)


@pytest.mark.fault(
    "the last server is lost amid a sample",
    phase="sampling",
    seen="a warning; the sample goes on after the next weight update",
    lost="nothing",
)
def test_what_the_last_server_had_told_is_not_lost_with_it(
    proxy: FaultProxy, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    with one_engine([proxy.url], stream_interval=INTERVAL) as (engine, push):
        push.push(weights.stream(VERSION), VERSION)
        whole = one(engine, greedy())
        proxy.faults["/generate"] = [streamed_until(3, cut)]
        proxy.faults["/model_info"] = [cut_off()] * 2  # a GET is sent once more by the client itself
        with kept_away(monkeypatch), pytest.raises(EngineLostWeights):
            collect(engine, [greedy()])
        push.push(weights.stream(VERSION), VERSION)
        check_equal(one(engine, replace(greedy(), request_id="p#1", affinity=greedy().affinity)), whole)
        assert engine.metrics()["servers/continued"] == 1
        check_equal(one(engine, greedy()), whole)
        assert engine.metrics()["servers/continued"] == 0, "it is used once"


def test_tokens_of_older_weights_are_not_taken_for_those_of_newer_ones(
    proxy: FaultProxy, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    with one_engine([proxy.url], stream_interval=INTERVAL) as (engine, push):
        push.push(weights.stream(VERSION), VERSION)
        proxy.faults["/generate"] = [streamed_until(3, cut)]
        proxy.faults["/model_info"] = [cut_off()] * 2
        with kept_away(monkeypatch), pytest.raises(EngineLostWeights):
            collect(engine, [greedy()])
        push.push(weights.stream(VERSION + 1), VERSION + 1)
        assert set(one(engine, greedy()).weight_versions.tolist()) == {VERSION + 1}
        counted = engine.metrics()
        assert counted["servers/continued"] == 0 and counted["servers/lost_tokens"] > 0


def test_what_a_broken_answer_held_is_not_kept(proxy: FaultProxy, weights: Weights) -> None:
    def spoilt(answer: Answer) -> Answer:
        meta = answer["meta_info"] | {"finish_reason": {"type": "abort"}, "output_token_logprobs": []}
        return answer | {"meta_info": meta}

    with one_engine([proxy.url], stream_interval=INTERVAL) as (engine, push):
        push.push(weights.stream(VERSION), VERSION)
        whole = one(engine, greedy())
        proxy.faults["/generate"] = [changed(spoilt)]
        check_equal(one(engine, greedy()), whole)
        counted = engine.metrics()
        assert counted["servers/continued"] == 0 and counted["servers/lost_tokens"] == TOKENS


def test_without_streaming_nothing_is_streamed(proxy: FaultProxy, weights: Weights) -> None:
    with one_engine([proxy.url], stream_interval=0) as (engine, push):
        push.push(weights.stream(VERSION), VERSION)
        one(engine, greedy(tokens=4))
        assert "stream" not in proxy.asked["/generate"][-1]
    proxy.faults["/server_info"] = [changed(lambda a: a | {"incremental_streaming_output": False})]
    with one_engine([proxy.url]) as (engine, push):
        push.push(weights.stream(VERSION), VERSION)
        one(engine, greedy(tokens=4))
        assert "stream" not in proxy.asked["/generate"][-1], "each piece would hold all tokens so far"
