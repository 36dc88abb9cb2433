"""The engine on a real server: what it asks, what it refuses, what it does when things go wrong on the way."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from fault_proxy import FaultProxy, changed, cut_off, delay, status
from one_engine import TOLERANCE, VOCAB, Weights, collect, completions, one_engine, request
from server_tools import LiveServer, serves

from megatron_hdpo.model.policy import TrainingError
from megatron_hdpo.rollout.engine import EngineLostWeights
from megatron_hdpo.rollout.sglang.engine import SGLangEngine
from megatron_hdpo.rollout.sglang.stamps import RunStamp
from megatron_hdpo.rollout.sglang.weights.gate import GateError
from megatron_hdpo.rollout.sglang.weights.push import WeightPush, WeightPushError
from megatron_hdpo.training.rollout_phase import check_versions
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.rollouts import Completion, GenerationRequest, Group, Sample, outline_of


def test_samples_carry_what_the_trainer_needs(sglang_server: LiveServer, weights: Weights) -> None:
    with one_engine([sglang_server.url]) as (engine, push):
        with pytest.raises(EngineLostWeights):
            collect(engine, [request()])
        push.push(weights.stream(3), 3)
        wanted = request(n=6, tokens=12, top_logprobs=4, stop_token_ids=(1, 5))
        samples = completions(collect(engine, [wanted, request("q#0", n=2, tokens=3)]))
    assert len(samples) == 8
    for sample in samples[:]:
        prompt = wanted.prompt_ids
        assert weights.worst(prompt, sample, 3) < TOLERANCE
        assert sample.weight_versions.tolist() == [3] * len(sample.token_ids)
        stopped = sample.token_ids[-1] in (1, 5)
        if sample.top_logprobs is not None:
            assert sample.finish_reason == ("stop" if stopped else "length")
            assert not np.isin(sample.token_ids[:-1], (1, 5)).any()
            rows = np.sort(weights.logprobs(prompt, sample, 3), axis=1)[:, ::-1][:, :4]
            np.testing.assert_allclose(sample.top_logprobs.logprobs_TK, rows, atol=TOLERANCE)
    assert {len(s.token_ids) for s in samples if s.top_logprobs is None} == {3}, "no stop tokens: to the limit"


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"prompt": [2, VOCAB]}, "outside the vocabulary"),
        ({"prompt": [-1]}, "outside the vocabulary"),
        ({"prompt": []}, "at least one token"),
        ({"top_logprobs": VOCAB + 1}, "top_logprobs"),
        ({"tokens": 126}, "exceed the context"),
        ({"tokens": 124}, "sample at most 126 together"),
        ({"prompt": [2] * 124, "tokens": 1}, "the servers accept at most"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
    ],
    ids=lambda value: str(value)[:24] if isinstance(value, dict) else "",
)
def test_what_would_kill_a_server_never_leaves(
    sglang_server: LiveServer, weights: Weights, bad: dict[str, Any], words: str
) -> None:
    with one_engine([sglang_server.url]) as (engine, push):
        push.push(weights.stream(0), 0)
        with pytest.raises(ValueError, match=words):
            engine.submit([request("good#0"), request(**bad)])
        assert list(engine.results()) == [], "all or none"
        assert len(completions(collect(engine, [request()]))) == 1


@pytest.mark.parametrize(
    "fault",
    [status(500), status(503), status(429), cut_off()],
    ids=["500", "503", "429", "connection broken"],
)
@pytest.mark.fault(
    "status 429, 500 or 503, or a broken connection", phase="sampling", seen="`servers/failed_tries`", lost="nothing"
)
def test_what_may_pass_is_asked_again(proxy: FaultProxy, weights: Weights, fault: Any) -> None:
    with one_engine([proxy.url]) as (engine, push):
        push.push(weights.stream(1), 1)
        before = len(proxy.asked["/generate"])
        proxy.faults["/generate"] = [fault, None, fault, fault]
        samples = completions(collect(engine, [request(n=3)]))
        assert len(samples) == 3 and all(weights.worst(request().prompt_ids, s, 1) < TOLERANCE for s in samples)
        asked = proxy.asked["/generate"][before:]
    assert len(asked) == 6, "three samples and three faults: what has come is not asked for again"
    assert len({body["rid"] for body in asked}) == 6 and all("input_ids" in body for body in asked)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda a: a | {"output_ids": a["output_ids"][:-1]},
        lambda a: a | {"meta_info": a["meta_info"] | {"finish_reason": {"type": "abort", "message": "no room"}}},
        lambda a: a | {"meta_info": a["meta_info"] | {"output_token_logprobs": []}},
        lambda a: a | {"output_ids": [VOCAB, *a["output_ids"][1:]]},
        lambda a: {"error": "what?"},
    ],
    ids=["cut short", "aborted", "no log-probs", "beyond the vocabulary", "no completion"],
)
@pytest.mark.fault(
    "an answer without log-probs, cut short, or with tokens beyond the vocabulary",
    phase="sampling",
    seen="`servers/failed_tries`",
    lost="nothing",
)
def test_a_broken_answer_is_no_sample(proxy: FaultProxy, weights: Weights, spoil: Any) -> None:
    with one_engine([proxy.url]) as (engine, push):
        push.push(weights.stream(1), 1)
        proxy.faults["/generate"] = [changed(spoil)]
        (sample,) = completions(collect(engine, [request()]))
        assert weights.worst(request().prompt_ids, sample, 1) < TOLERANCE


def test_what_never_passes_is_an_error_and_no_sample(proxy: FaultProxy, weights: Weights) -> None:
    with one_engine([proxy.url], max_tries=2) as (engine, push):
        push.push(weights.stream(1), 1)
        proxy.faults["/generate"] = [status(500)] * 2
        (result,) = collect(engine, [request()])
        assert result.completions == [] and "500" in result.errors[0]
        before = len(proxy.asked["/generate"])
        proxy.faults["/generate"] = [status(400)]
        (result,) = collect(engine, [request()])
        assert result.completions == [] and "injected" in result.errors[0]
        assert len(proxy.asked["/generate"]) == before + 1, "a request that is wrong stays wrong"


def test_a_deadline_stops_the_server_and_asks_again(proxy: FaultProxy, weights: Weights) -> None:
    with one_engine([proxy.url], request_timeout_s=5.0) as (engine, push):
        push.push(weights.stream(1), 1)
        before = len(proxy.asked["/generate"])
        proxy.faults["/generate"] = [delay(600.0)]
        assert len(completions(collect(engine, [request()]))) == 1
        late = proxy.asked["/generate"][before]["rid"]
        assert [body["rid"] for body in proxy.asked["/abort_request"]] == [late]


def test_a_slow_server_is_waited_for(proxy: FaultProxy, weights: Weights) -> None:
    with one_engine([proxy.url]) as (engine, push):
        push.push(weights.stream(1), 1)
        before = len(proxy.asked["/generate"])
        proxy.faults["/generate"] = [delay(1.0)] * 4
        assert len(completions(collect(engine, [request(n=4)]))) == 4
        assert len(proxy.asked["/generate"]) == before + 4


def test_cancelled_samples_come_back_as_such(proxy: FaultProxy, weights: Weights) -> None:
    with one_engine([proxy.url]) as (engine, push):
        assert engine.slots == 0, "its server has no weights of the run"
        push.push(weights.stream(1), 1)
        assert engine.slots == engine.config.max_concurrency
        proxy.faults["/generate"] = [None, None, delay(600.0), delay(600.0), delay(600.0)]
        engine.submit([request(n=5)])
        samples, cancelled, begin = 0, 0, time.monotonic()
        for result in engine.results():
            if result is not None:
                samples += len(result.completions)
                cancelled += result.cancelled
                assert not result.errors
                if samples == 2 and not cancelled:
                    engine.cancel(["p#0", "unknown#0"])
        assert (samples, cancelled) == (2, 3) and time.monotonic() - begin < 300


def test_a_version_that_was_missed_stops_the_run() -> None:
    ids = np.arange(3, dtype=np.int32)
    sample = Completion(ids, -np.ones(3, np.float32), "length", np.array([4, 4, 3], np.int32))
    outline = outline_of(Group(Problem("p/0", "p", "q", "a"), request().prompt_ids, [Sample(sample, "", 0.0)]))
    with pytest.raises(TrainingError, match=r"step 4: problem p/0 .* \[3, 4\], not 4"):
        check_versions([outline], 4)
    check_versions([outline], 4, ahead=1)
    with pytest.raises(TrainingError, match="not 4 to 5"):
        check_versions([outline], 5, ahead=1)


@pytest.mark.fault(
    "a server fails amid a weight update",
    phase="weight update",
    seen="one line; it is not used before a whole update",
    lost="nothing",
)
def test_half_updated_servers_serve_nothing(proxy: FaultProxy, weights: Weights) -> None:
    with one_engine([proxy.url], health_interval_s=0.2) as (engine, push):
        push.push(weights.stream(1), 1)
        push.config.bucket_mib = 0.01  # type: ignore[assignment]
        proxy.faults["/update_weights_from_tensor"] = [None, None, status(500)]
        with pytest.raises(WeightPushError, match=r"version 2: .*injected"):
            push.push(weights.stream(2), 2)
        assert not serves(engine)
        time.sleep(1.0)  # the server answers, and states version 1 still, but half of its weights are of version 2
        assert not serves(engine)
        with pytest.raises(EngineLostWeights):
            collect(engine, [request()])
        push.push(weights.stream(2), 2)
        (sample,) = completions(collect(engine, [request()]))
        assert weights.worst(request().prompt_ids, sample, 2) < TOLERANCE
        assert len(proxy.asked["/end_weight_update"]) == 3, "the session that was left open is closed and begun anew"


def uniform(answer: Any) -> Any:
    """Eight of seventeen tokens, each of nearly the same probability."""
    ids = answer["output_ids"]
    tops = [[[-2.8, i, None] for i in (token, *(i for i in range(8) if i != token))][:8] for token in ids]
    rows = [[-2.8, token, None] for token in ids]
    return answer | {"meta_info": answer["meta_info"] | {"output_top_logprobs": tops, "output_token_logprobs": rows}}


@pytest.mark.parametrize("words", ["near uniform", r"version \[6\], not 7", r"version \[-1\], not 7"])
@pytest.mark.fault(
    "a server answers uniform log-probs, or those of other weights, after an update",
    phase="weight update",
    seen="`near uniform`, or both versions; asked three times before",
    lost="nothing",
)
def test_the_probe_knows_a_broken_teacher(proxy: FaultProxy, weights: Weights, words: str) -> None:
    with one_engine([proxy.url]) as (engine, push):
        stamp = RunStamp().of(7) if "-1" in words else engine.stamp.of(6)

        def other(answer: Any) -> Any:
            spans = [{"version": stamp, "start": 0, "end": 4}]
            return answer | {"meta_info": answer["meta_info"] | {"weight_versions": spans}}

        change = uniform if "uniform" in words else other
        proxy.faults["/generate"] = [changed(change)] * 3
        with pytest.raises(GateError, match=words):
            push.push(weights.stream(7), 7)
        assert not serves(engine) and not proxy.faults["/generate"], "asked three times"
        proxy.faults["/generate"] = [changed(change)] * 2
        push.push(weights.stream(7), 7)
        assert serves(engine), "the third sample showed the weights"


@pytest.mark.parametrize("pause", ["retract", "in_place", "abort"])
def test_weights_may_change_amid_a_sample(proxy: FaultProxy, weights: Weights, pause: str) -> None:
    wanted = request(n=12, tokens=110)
    with one_engine([proxy.url], sync={"pause": pause}) as (engine, push):
        samples, old, asked = sampled_while_weights_change(engine, push, weights, proxy, wanted)
    new = old + 1
    spans = [sorted(set(s.weight_versions.tolist())) for s in samples]
    assert set(map(tuple, spans)) <= {(old,), (new,), (old, new)}
    assert [old, new] in spans, "the update came while they were being sampled"
    assert engine.mixed_versions == spans.count([old, new])
    if pause == "abort":
        assert asked > 12, "the aborted ones were continued by new requests"
    for sample in samples:
        if pause == "in_place" and len(set(sample.weight_versions.tolist())) == 2:
            continue  # keys and values of the old weights: no model gives these log-probs
        for version in set(sample.weight_versions.tolist()):
            rows = weights.logprobs(wanted.prompt_ids, sample, version)
            own = rows[np.arange(len(rows)), sample.token_ids]
            at = sample.weight_versions == version
            assert np.abs(own - sample.logprobs)[at].max() < 1e-4


def sampled_while_weights_change(
    engine: SGLangEngine, push: WeightPush, weights: Weights, proxy: FaultProxy, wanted: GenerationRequest
) -> tuple[list[Completion], int, int]:
    """Samples that an update came amid of, the version they began with, and how often the server was asked for one.

    When a sample is half done depends on the machine, so this tries: earlier when all samples were over before the
    update, later when none had begun.
    """
    wait_s = 0.3
    for turn in range(20):
        old = 2 * turn  # the larger the version, the larger the weights, and the rounding of log-probs
        push.push(weights.stream(old), old)
        asked, results = len(proxy.asked["/generate"]), []
        engine.submit([wanted])
        reader = threading.Thread(target=lambda into=results: into.extend(r for r in engine.results() if r is not None))
        reader.start()
        time.sleep(wait_s)
        push.push(weights.stream(old + 1), old + 1)
        reader.join(300)
        samples = completions(results)
        assert len(samples) == wanted.sampling.n
        # The probe of the weights asks once.
        asked = len(proxy.asked["/generate"]) - asked - 1
        versions = {int(version) for sample in samples for version in sample.weight_versions}
        if engine.mixed_versions:
            return samples, old, asked
        wait_s = wait_s / 2 if versions == {old} else wait_s * 2
    raise AssertionError("no update of 20 came amid the samples")


def test_samples_of_two_versions_may_be_unwanted(proxy: FaultProxy, weights: Weights) -> None:
    with one_engine([proxy.url], mixed_versions="drop") as (engine, push):

        def mixed(answer: Any) -> Any:
            spans = [{"version": engine.stamp.of(v), "start": 4 * v, "end": 4 * v + 4} for v in (0, 1)]
            return answer | {"meta_info": answer["meta_info"] | {"weight_versions": spans}}

        push.push(weights.stream(0), 0)
        engine.newest_version = 1  # as amid the update to it
        proxy.faults["/generate"] = [changed(mixed)]
        (sample,) = completions(collect(engine, [request()]))
        assert set(sample.weight_versions.tolist()) == {0} and engine.mixed_versions == 1
