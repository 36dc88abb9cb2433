"""The engine when things happen at once: updates that fail amid samples, servers lost and back, ends amid work."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from fault_proxy import FaultProxy, changed, cut_off, delay, held, status
from one_engine import TOLERANCE, Weights, collect, completions, kept_away, one_engine, request
from safetensors import SafetensorError
from server_tools import LiveServer, serves, wait_until

from megatron_hdpo.rollout.engine import EngineLostWeights
from megatron_hdpo.rollout.sglang.engine import SGLangEngine
from megatron_hdpo.rollout.sglang.weights.gate import Gate, GateError
from megatron_hdpo.rollout.sglang.weights.push import WeightPushError
from megatron_hdpo.rollout.sglang.weights.transports import BroadcastTransport, DiskTransport, TensorTransport


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """`work()` in a thread; fails when it hangs."""
    outcome: list[Any] = []

    def call() -> None:
        try:
            outcome.append((work(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    assert outcome, f"not over after {seconds} s"
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def drain(engine: SGLangEngine) -> list[Any]:
    return [result for result in engine.results() if result is not None]


def test_what_was_in_progress_when_an_update_failed_is_no_sample(proxy: FaultProxy, weights: Weights) -> None:
    """Some samples are likely half done on the server when the update fails; one does not reach it before."""
    prepare, failed = TensorTransport.prepare, threading.Event()
    with one_engine([proxy.url]) as (engine, push):
        push.push(weights.stream(0), 0)
        push.transport.prepare = lambda b: prepare(push.transport, [(n, t * 1.5) for n, t in b])  # type: ignore
        proxy.faults["/generate"] = [held(failed)]
        engine.submit([request(n=12, tokens=110)])
        time.sleep(0.2)
        with pytest.raises(GateError):
            push.push(weights.stream(1), 1)
        failed.set()
        time.sleep(1.0)
        found: list[Any] = []
        with pytest.raises(EngineLostWeights):
            for result in engine.results():
                found += [] if result is None else completions([result])
        assert all(weights.worst(request().prompt_ids, sample, 0) < TOLERANCE for sample in found)
        assert {int(v) for sample in found for v in sample.weight_versions} <= {0}


def test_weights_that_were_lost_and_came_back_unseen(sglang_server: LiveServer, weights: Weights) -> None:
    with one_engine([sglang_server.url]) as (engine, push):
        engine.submit([request(n=3)])
        time.sleep(0.2)
        push.push(weights.stream(1), 1)
        with pytest.raises(EngineLostWeights):
            within(120, lambda: drain(engine))
        assert len(completions(within(120, lambda: collect(engine, [request(n=3)])))) == 3
        assert not engine._tasks and not engine._outstanding and not engine.replicas[0].in_flight


def test_a_server_that_is_lost_while_it_is_probed_does_not_serve(
    sglang_server: LiveServer, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = Gate.probe

    async def probe_and_lose(self: Gate, servers: Any, version: int, stamp: Any) -> None:
        await probe(self, servers, version, stamp)
        await servers._watch.mark_down(servers.replicas[0], "gone")

    with one_engine([sglang_server.url], health_interval_s=0.3) as (engine, push):
        monkeypatch.setattr(Gate, "probe", probe_and_lose)
        with kept_away(monkeypatch):
            push.push(weights.stream(1), 1)
            assert engine.replicas[0].state == "down"
        assert wait_until(lambda: engine.replicas[0].state == "serving"), "it has the weights, and comes back"


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.fault(
    "no room for weights that are sent by disk",
    phase="weight update",
    seen="`No space left`; half a file is not left",
    lost="nothing",
)
def test_a_folder_that_cannot_be_written_costs_the_update_alone(
    sglang_server: LiveServer, weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """before anything, at the first file, at the index: on a disk without room."""
    from megatron_hdpo.rollout.sglang.weights import transports

    def full(*args: Any, **kw: Any) -> None:
        if after == 1:  # safetensors raises an error of its own
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError(28, "No space left on device")

    with one_engine([sglang_server.url]) as (engine, push):
        push.push(weights.stream(1), 1)
        push.transport = DiskTransport(60.0, tmp_path / "sync", sglang_server.model)
        target = [(transports.shutil, "copy"), (transports, "save_file"), (transports.json, "dumps")][after]
        with monkeypatch.context() as patch:
            patch.setattr(*target, full)
            read: list[str] = []
            with pytest.raises(WeightPushError, match="No space left"):
                push.push(((read.append(n), (n, t))[1] for n, t in weights.stream(2)), 2)
        assert len(read) == len(list(weights.stream(2))), "other ranks gather for every tensor of the stream"
        assert not engine.watch.paused and not serves(engine)
        assert not (tmp_path / "sync").exists(), "half of the weights would fill the disk for as long as it is full"
        push.push(weights.stream(3), 3)
        (sample,) = completions(within(120, lambda: collect(engine, [request()])))
        assert weights.worst(request().prompt_ids, sample, 3) < TOLERANCE


def test_a_group_that_cannot_be_joined_costs_the_update_alone(proxy: FaultProxy, weights: Weights) -> None:
    import torch

    with one_engine([proxy.url], health_interval_s=0.3) as (engine, push):
        push.transport = BroadcastTransport(4.0, torch.device("cpu"))
        proxy.faults["/init_weights_update_group"] = [status(500)]
        with pytest.raises(WeightPushError, match="injected"):
            within(120, lambda: push.push(weights.stream(1), 1))
        push.transport.timeout_s = 120.0  # the join that failed took all of its time; this one may take what it needs
        push.push(weights.stream(2), 2)
        (sample,) = completions(collect(engine, [request()]))
        assert weights.worst(request().prompt_ids, sample, 2) < TOLERANCE
        push.close()


def test_a_given_server_may_be_away_for_a_moment(
    proxy: FaultProxy, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    with one_engine([proxy.url], health_interval_s=1.0) as (engine, push):
        push.push(weights.stream(1), 1)
        # Two: a GET whose connection breaks is sent once more by the client itself.
        proxy.faults["/generate"], proxy.faults["/model_info"] = [cut_off()], [cut_off()] * 2
        with kept_away(monkeypatch), pytest.raises(EngineLostWeights):
            collect(engine, [request()])
        push.push(weights.stream(1), 1)
        assert len(completions(collect(engine, [request(n=2)]))) == 2


def test_nothing_that_a_server_answers_ends_the_watch_over_it(proxy: FaultProxy, weights: Weights) -> None:
    with one_engine([proxy.url], health_interval_s=0.2) as (engine, push):
        push.push(weights.stream(1), 1)
        proxy.faults["/server_info"] = [changed(lambda a: []), changed(lambda a: a | {"version": "no number"})]  # type: ignore
        proxy.faults["/model_info"] = [changed(lambda a: [])]  # type: ignore
        engine.thread.run(engine.watch.mark_down(engine.replicas[0], "a test"))
        assert wait_until(lambda: not proxy.faults["/server_info"] and serves(engine)), engine.replicas


def test_requests_of_one_id_are_refused(sglang_server: LiveServer, weights: Weights) -> None:
    with one_engine([sglang_server.url]) as (engine, push):
        push.push(weights.stream(1), 1)
        with pytest.raises(ValueError, match="duplicate request ids"):
            engine.submit([request("a#0"), request("a#0")])
        assert drain(engine) == []


def test_the_context_of_a_server_bounds_its_samples(proxy: FaultProxy, weights: Weights) -> None:
    """A server with a shorter context would end them early and call it their length."""
    proxy.faults["/server_info"] = [changed(lambda a: a | {"context_length": 64})]
    with one_engine([proxy.url]) as (engine, push):
        push.push(weights.stream(1), 1)
        with pytest.raises(ValueError, match=r"3 prompt \+ 60 new tokens; the servers sample at most 62 together"):
            engine.submit([request(tokens=60)])


def test_memory_that_is_lent_is_not_looked_at(proxy: FaultProxy, weights: Weights) -> None:
    async def done(request: web.Request, proxy: FaultProxy) -> web.Response:
        return web.json_response({})

    proxy.faults["/server_info"] = [changed(lambda a: a | {"enable_memory_saver": True})]
    with one_engine([proxy.url], health_interval_s=0.2) as (engine, push):
        engine.config.servers.memory_saver = True
        push.push(weights.stream(1), 1)
        proxy.faults["/release_memory_occupation"] = [done]
        engine.make_room()
        looks = len(proxy.asked.get("/health", []))
        time.sleep(1.5)
        assert len(proxy.asked.get("/health", [])) == looks, "a look at /health samples, with no weights to sample by"
        assert engine.replicas[0].state == "stale" and engine.replicas[0].asleep
        proxy.faults["/resume_memory_occupation"] = [done, done]
        push.push(weights.stream(2), 2)
        assert [body["tags"] for body in proxy.asked["/resume_memory_occupation"]] == [
            ["weights"],
            ["kv_cache", "cuda_graph"],
        ]
        proxy.faults["/release_memory_occupation"] = [status(500)]
        engine.make_room()
        assert not serves(engine), "it is taken out, and the trainer goes on"


def test_a_router_may_not_hand_over_samples_of_older_weights(proxy: FaultProxy, weights: Weights) -> None:
    with one_engine([proxy.target], router=proxy.url) as (engine, push):

        def older(answer: Any) -> Any:
            stamp = {"weight_version": engine.stamp.of(1), "weight_versions": []}
            return answer | {"meta_info": answer["meta_info"] | stamp}

        push.push(weights.stream(2), 2)
        proxy.faults["/generate"] = [changed(older), changed(older)]
        samples = completions(collect(engine, [request(n=3)]))
        assert {int(v) for sample in samples for v in sample.weight_versions} == {2}
        assert len(proxy.asked["/generate"]) == 5


def test_an_engine_may_be_closed_amid_anything(proxy: FaultProxy, weights: Weights) -> None:
    with one_engine([proxy.url]) as (engine, push):
        push.push(weights.stream(1), 1)
        proxy.faults["/generate"] = [delay(600.0)] * 4
        engine.submit([request(n=4)])
        reader = threading.Thread(target=lambda: drain(engine), daemon=True)
        reader.start()
        proxy.faults["/pause_generation"] = [delay(600.0)]
        pushing = threading.Thread(target=lambda: quietly(lambda: push.push(weights.stream(2), 2)), daemon=True)
        pushing.start()
        time.sleep(0.5)
        within(120, engine.close)
        within(60, engine.close)
        reader.join(120)
        pushing.join(120)
        assert not reader.is_alive() and not pushing.is_alive()
        with pytest.raises(Exception, match="closed"):
            within(120, lambda: engine.submit([request("late#0")]))
    assert asyncio.run(alone()) == 1


async def alone() -> int:
    """No loop of the engine's is in the way."""
    return len(asyncio.all_tasks())


def quietly(work: Callable[[], Any]) -> None:
    try:
        work()
    except BaseException:
        return


def test_nothing_is_kept_of_requests_that_are_over(sglang_server: LiveServer, weights: Weights) -> None:
    with one_engine([sglang_server.url]) as (engine, push):
        push.push(weights.stream(1), 1)
        for turn in range(5):
            engine.submit([request(f"{turn}.{i}#0", n=4, tokens=20) for i in range(4)])
            engine.cancel([f"{turn}.0#0"])
            drain(engine)
            assert not engine._tasks and not engine._outstanding and not engine.replicas[0].in_flight
        assert len(asyncio.all_tasks(engine.thread.loop)) <= 3, "the watch, its clock and the dispatcher alone"


def test_weights_travel_in_the_type_that_servers_hold(proxy: FaultProxy, weights: Weights) -> None:
    """What a server rounds has another checksum than what was sent: it is rounded here."""
    proxy.faults["/server_info"] = [changed(lambda answer: answer | {"dtype": "bfloat16"})]
    with one_engine([proxy.url], gate=False) as (engine, push):
        report = push.push(weights.stream(1), 1)
        whole = sum(tensor.numel() for _, tensor in weights.stream(1))
        assert report.num_bytes == 2 * whole and serves(engine)
    with one_engine([proxy.url]) as (_, push):
        assert push.push(weights.stream(2), 2).num_bytes == 4 * whole
