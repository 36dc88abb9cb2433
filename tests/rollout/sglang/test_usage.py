"""What servers are said to have done in a step: integrals over a known clock, and against a real server."""

from __future__ import annotations

import threading

import pytest
from aiohttp import web
from fault_proxy import FaultProxy, held
from one_engine import Weights, collect, completions, one_engine, request
from server_tools import LiveServer, wait_until

from megatron_hdpo.rollout.sglang.usage import Usage
from megatron_hdpo.types.metrics import reduce_metrics


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_requests_and_samples_are_averaged_over_the_seconds_in_which_servers_work() -> None:
    clock = Clock()
    usage = Usage(clock)
    clock.now += 50  # nothing runs: no seconds of work
    usage.sample(3)
    with usage.running():
        clock.now += 4
        with usage.running():
            clock.now += 2
        usage.answer(30, {"prompt_tokens": 10, "cached_tokens": 4})
    usage.answer(10, {"prompt_tokens": 10, "cached_tokens": 9})
    usage.sample(-3)
    clock.now += 50
    assert usage.take() == {
        "servers/asleep_s": 0.0,
        "servers/running": pytest.approx((4 * 1 + 2 * 2) / 6),
        "servers/waiting": pytest.approx((4 * 2 + 2 * 1) / 6),
        "servers/tokens_per_s": pytest.approx(40 / 6),
        "servers/cache_hit_rate": 13 / 20,
    }
    assert usage.take() == {"servers/asleep_s": 0.0}, "a step in which nothing was told has no zeros in it"


def test_what_goes_on_over_the_end_of_a_step_counts_in_both() -> None:
    clock = Clock()
    usage = Usage(clock)
    with usage.running():
        clock.now += 3
        usage.sleep(True)
        usage.answer(6, {})
        assert usage.take()["servers/tokens_per_s"] == 2
        clock.now += 1
        usage.sleep(True)
        usage.answer(6, {})
        usage.queue(4)
        usage.queue(0)
        clock.now += 1
        usage.sleep(False)
        usage.sleep(False)
        clock.now += 1
        assert usage.take() == {
            "servers/asleep_s": 2,
            "servers/running": 1,
            "servers/waiting": 0,
            "servers/tokens_per_s": 2,
            "servers/queued": 2,
        }


def test_what_a_broken_answer_says_of_its_prompt_is_not_counted() -> None:
    usage = Usage()
    for meta in ({"prompt_tokens": "many", "cached_tokens": 3}, {"prompt_tokens": 9}, {}):
        usage.answer(1, meta)
    assert "servers/cache_hit_rate" not in usage.take()


def test_ranks_are_summed_and_one_without_servers_says_nothing() -> None:
    clock = Clock()
    ranks = [Usage(clock) for _ in range(3)]
    ranks[0].sleep(True)
    with ranks[0].running(), ranks[1].running(), ranks[1].running():
        clock.now += 2
        ranks[0].answer(8, {"prompt_tokens": 4, "cached_tokens": 1})
        ranks[1].answer(6, {"prompt_tokens": 8, "cached_tokens": 6})
    assert reduce_metrics([usage.take() for usage in ranks]) == {
        "servers/asleep_s": 2,
        "servers/running": 3,
        "servers/waiting": 0,
        "servers/tokens_per_s": 7,
        "servers/cache_hit_rate": 0.5,
    }


def test_a_real_servers_cache_is_seen(sglang_server: LiveServer, weights: Weights) -> None:
    """The second time all but the last token of the prompt come from the prefix cache."""
    prompt = tuple(2 + i % 10 for i in range(80))
    with one_engine([sglang_server.url]) as (engine, push):
        push.push(weights.stream(1), 1)  # it empties the cache
        engine.metrics()
        completions(collect(engine, [request("a#0", prompt=prompt)]))
        first = engine.metrics()
        assert first["servers/cache_hit_rate"] == 0.0
        assert first["servers/all"] == first["servers/in_use"] == 1 and first["servers/restarts"] == 0
        assert 0 < first["servers/running"] <= 1 and first["servers/tokens_per_s"] > 0
        completions(collect(engine, [request("b#0", prompt=prompt)]))
        assert engine.metrics()["servers/cache_hit_rate"] == pytest.approx(79 / 80)
        assert "servers/cache_hit_rate" not in engine.metrics()


def test_a_real_server_tells_how_many_wait_within_it(sglang_server: LiveServer) -> None:
    with one_engine([sglang_server.url]) as (engine, _):
        assert engine.thread.run(engine.replicas[0].api.waiting()) == 0


def test_a_servers_own_queue_is_noted_while_it_samples(proxy: FaultProxy, weights: Weights) -> None:
    async def loads(request: web.Request, proxy: FaultProxy) -> web.Response:
        return web.json_response({"loads": [{"num_waiting_reqs": 5}]})

    async def unknown(request: web.Request, proxy: FaultProxy) -> web.Response:
        return web.json_response({"detail": "Not Found"}, status=404)

    released = threading.Event()
    proxy.faults["/v1/loads"] = [unknown, *[loads] * 1000]
    proxy.faults["/generate"] = [None, held(released)]  # the first is the probe after the weight update
    with one_engine([proxy.url], health_interval_s=0.1) as (engine, push):
        push.push(weights.stream(1), 1)
        engine.submit([request()])
        assert wait_until(lambda: bool(engine.usage._queues))
        assert len(proxy.asked["/v1/loads"]) >= 2, "a server that does not tell is no queue of 0"
        released.set()
        assert len(completions([result for result in engine.results() if result is not None])) == 1
        assert engine.metrics()["servers/queued"] == 5
