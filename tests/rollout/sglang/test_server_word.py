"""What a server says is checked: answers that contradict the request or themselves, weights of others, odd probes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import FaultProxy, changed, cut_off, status
from one_engine import TOLERANCE, Weights, collect, completions, one_engine, request
from server_tools import LiveServer, serves, wait_until

from megatron_hdpo.rollout.engine import EngineLostWeights
from megatron_hdpo.rollout.sglang.asking import request_body
from megatron_hdpo.rollout.sglang.servers.command import ServerLaunch
from megatron_hdpo.rollout.sglang.servers.config import ServerConfig
from megatron_hdpo.rollout.sglang.servers.fleet import ServerFleet
from megatron_hdpo.rollout.sglang.stamps import RunStamp
from megatron_hdpo.rollout.sglang.weights.push import ForeignWeightsError, WeightPush, WeightPushError

Answer = dict[str, Any]


def with_meta(answer: Answer, **meta: Any) -> Answer:
    return answer | {"meta_info": answer["meta_info"] | meta}


def halved(answer: Answer) -> Answer:
    """Consistent, but half as long: as of a server without room for the rest."""
    half = len(answer["output_ids"]) // 2
    rows = answer["meta_info"]["output_token_logprobs"][:half]
    finish = {"type": "length", "length": half}
    return with_meta(
        answer | {"output_ids": answer["output_ids"][:half]}, output_token_logprobs=rows, finish_reason=finish
    )


def stopped(answer: Answer) -> Answer:
    """Ended by a stop token that is none."""
    return with_meta(answer, finish_reason={"type": "stop", "matched": answer["output_ids"][-1]})


def raised(by: float) -> Callable[[Answer], Answer]:
    def change(answer: Answer) -> Answer:
        rows = [[value + by, *rest] for value, *rest in answer["meta_info"]["output_token_logprobs"]]
        return with_meta(answer, output_token_logprobs=rows)

    return change


FALSE: dict[str, tuple[Callable[[Answer], Answer], int]] = {
    "half as long": (halved, 0),
    "a stop without a stop token": (stopped, 0),
    "log-probs + 5": (raised(5.0), 0),
    "log-probs - 0.1, with their rows": (raised(-0.1), 4),
}


@pytest.mark.parametrize("name", list(FALSE))
@pytest.mark.fault(
    "an answer that is consistent and false: half as long, no stop token, other log-probs",
    phase="sampling",
    seen="`servers/failed_tries`; after `max_tries` `rollout/generation_failed`",
    lost="that sample, if every try is false",
)
def test_a_false_answer_is_sampled_again_and_never_a_sample(proxy: FaultProxy, weights: Weights, name: str) -> None:
    falsify, top = FALSE[name]
    with one_engine([proxy.url], max_tries=3) as (engine, push):
        push.push(weights.stream(1), 1)
        before = len(proxy.asked["/generate"])
        proxy.faults["/generate"] = [changed(falsify)] * 2
        (sample,) = completions(collect(engine, [request(tokens=12, top_logprobs=top)]))
        assert len(sample.token_ids) == 12 and sample.finish_reason == "length"
        assert weights.worst(request().prompt_ids, sample, 1) < TOLERANCE
        assert len(proxy.asked["/generate"]) == before + 3
        proxy.faults["/generate"] = [changed(falsify)] * 3
        (result,) = collect(engine, [request(tokens=12, top_logprobs=top)])
        assert result.completions == [] and len(result.errors) == 1, "a failure, which is counted, and no sample"
        assert serves(engine)


def test_a_server_says_how_much_it_samples(sglang_server: LiveServer, weights: Weights) -> None:
    """One token more than it says is one that it does not sample, silently."""
    with one_engine([sglang_server.url]) as (engine, push):
        push.push(weights.stream(1), 1)
        room = engine.max_sequence
        assert room == 126, "of a context of 128"
        (sample,) = completions(collect(engine, [request(tokens=room - 3)]))
        assert len(sample.token_ids) == room - 3 and sample.finish_reason == "length"
        body = request_body(request(tokens=room - 2), 0, False)
        answer = engine.thread.run(engine.replicas[0].api.generate(body, 60))
        assert answer["meta_info"]["finish_reason"]["type"] == "length" and len(answer["output_ids"]) == room - 3


@pytest.mark.slow
def test_a_small_cache_cuts_short_what_it_says(
    sglang_config: ServerConfig, sglang_server: LiveServer, weights: Weights, tmp_path: Path
) -> None:
    config = sglang_config.model_copy(update={"max_total_tokens": 96})
    servers = ServerFleet(config, [ServerLaunch(sglang_server.model, "cpu", index=1)], tmp_path)
    servers.start()
    with one_engine(servers.urls, servers, max_tries=1) as (engine, push):
        push.push(weights.stream(1), 1)
        room = engine.max_sequence
        assert room == 94
        (sample,) = completions(collect(engine, [request(tokens=room - 3)]))
        assert len(sample.token_ids) == room - 3
        with pytest.raises(ValueError, match="the servers sample at most 94 together"):
            engine.submit([request(tokens=room - 2)])
        engine.replicas[0].info = replace(engine.replicas[0].info, max_sequence=128)
        (result,) = collect(engine, [request(tokens=room - 2)])
        assert result.completions == [] and "'length' after 91 of 92 tokens" in result.errors[0]


def stamped(stamp: str) -> Callable[[Answer], Answer]:
    return lambda answer: with_meta(answer, weight_version=stamp, weight_versions=[])


@pytest.mark.parametrize("which", ["older", "newer", "another run's", "none"])
@pytest.mark.fault(
    "an answer of older or newer weights, or of another run's",
    phase="sampling",
    seen="`servers/failed_tries`",
    lost="nothing",
)
def test_an_answer_of_other_weights_is_sampled_again(proxy: FaultProxy, weights: Weights, which: str) -> None:
    with one_engine([proxy.url]) as (engine, push):
        stamps = {"older": engine.stamp.of(0), "newer": engine.stamp.of(7), "another run's": RunStamp().of(1)}
        push.push(weights.stream(1), 1)
        before = len(proxy.asked["/generate"])
        proxy.faults["/generate"] = [changed(stamped(stamps.get(which, "default")))] * 2
        samples = completions(collect(engine, [request(n=2)]))
        assert {int(v) for sample in samples for v in sample.weight_versions} == {1}
        assert len(proxy.asked["/generate"]) == before + 4
        assert serves(engine), "the server still holds the run's weights; that answer alone was odd"


@pytest.mark.fault(
    "a server was restarted, and nobody saw it",
    phase="sampling",
    seen="a warning; it is not used before the next weight update",
    lost="nothing",
)
def test_a_server_that_holds_other_weights_is_not_used_before_the_next_update(
    proxy: FaultProxy, weights: Weights
) -> None:
    """As after a restart that no health check saw."""
    with one_engine([proxy.url]) as (engine, push):
        push.push(weights.stream(1), 1)
        proxy.faults["/generate"] = [changed(stamped("default"))]
        proxy.faults["/model_info"] = [changed(lambda answer: answer | {"weight_version": "default"})]
        with pytest.raises(EngineLostWeights, match="stamped 'default', which are not those of version 1"):
            collect(engine, [request()])
        push.push(weights.stream(1), 1)
        assert len(completions(collect(engine, [request(n=2)]))) == 2


@pytest.mark.fault(
    "two runs use one server",
    phase="sampling, weight update",
    seen="`two runs use the same server`: the first run ends",
    lost="the first run's steps since its checkpoint",
)
def test_two_runs_on_one_server_do_not_train_on_each_others_weights(
    sglang_server: LiveServer, weights: Weights
) -> None:
    """The second run takes the server; the first one, at the same step, ends at its next sample or update."""
    with one_engine([sglang_server.url]) as first, one_engine([sglang_server.url]) as second:
        for engine, push in (first, second):
            push.push(weights.stream(1 if engine is first[0] else 2), 1)
        with pytest.raises(EngineLostWeights, match="it holds weights stamped 'hdpo-"):
            collect(first[0], [request(n=4)])
        with pytest.raises(ForeignWeightsError, match="which this run did not send: two runs use the same server"):
            read: list[str] = []
            first[1].push(((read.append(n), (n, t))[1] for n, t in weights.stream(3)), 2)
        assert len(read) == len(list(weights.stream(3))), "other ranks gather for every tensor of the stream"
        samples = completions(collect(second[0], [request(n=4)]))
        assert all(weights.worst(request().prompt_ids, sample, 2) < TOLERANCE for sample in samples)
        second[1].push(weights.stream(4), 2)


def test_a_server_that_was_restarted_is_not_taken_for_another_runs(proxy: FaultProxy, weights: Weights) -> None:
    with one_engine([proxy.url]) as (engine, push):
        for version in (1, 2):
            push.push(weights.stream(version), version)
            proxy.faults["/model_info"] = [changed(lambda answer: answer | {"weight_version": "default"})]
        assert serves(engine)


def aborted(answer: Answer) -> Answer:
    return with_meta(answer, finish_reason={"type": "abort", "message": "no room"})


def not_finite(answer: Answer) -> Answer:
    return with_meta(answer, output_token_logprobs=[[None, token, None] for token in answer["output_ids"]])


ODD = {
    "503": status(503),
    "cut off": cut_off(),
    "aborted": changed(aborted),
    "not finite": changed(not_finite),
    "half": changed(halved),
    "no completion": changed(lambda answer: {"error": "what?"}),
}


@pytest.mark.parametrize("name", list(ODD))
def test_a_probe_without_a_sample_is_asked_again(proxy: FaultProxy, weights: Weights, name: str) -> None:
    with one_engine([proxy.url]) as (engine, push):
        proxy.faults["/generate"] = [ODD[name]] * 2
        assert push.push(weights.stream(1), 1).servers == 1
        assert serves(engine) and len(completions(collect(engine, [request(n=2)]))) == 2


def test_a_checksum_that_is_not_answered_is_asked_again(proxy: FaultProxy, weights: Weights) -> None:
    with one_engine([proxy.url]) as (engine, push):
        proxy.faults["/weights_checker"] = [status(503)]
        assert push.push(weights.stream(1), 1).servers == 1 and serves(engine)


def test_a_server_that_gives_no_probe_fails_the_update_and_not_the_gate(proxy: FaultProxy, weights: Weights) -> None:
    with one_engine([proxy.url], health_interval_s=0.2) as (engine, push):
        proxy.faults["/generate"] = [changed(not_finite)] * 3
        with pytest.raises(WeightPushError, match=r"version 1: .*a sample of a few tokens failed"):
            push.push(weights.stream(1), 1)
        assert not serves(engine)
        assert wait_until(lambda: push_again(push, weights)), engine.replicas
        assert serves(engine)


def push_again(push: WeightPush, weights: Weights) -> bool:
    try:
        return push.push(weights.stream(1), 1).servers == 1
    except WeightPushError:
        return False


def test_a_server_that_comes_back_with_less_room_is_not_used(proxy: FaultProxy, weights: Weights) -> None:
    with one_engine([proxy.url], health_interval_s=0.2) as (engine, push):
        engine.lengths = {"rollout.max_new_tokens 100": 100}
        push.push(weights.stream(1), 1)
        small = changed(lambda answer: answer | {"max_total_num_tokens": 64})
        proxy.faults["/server_info"] = [small] * 3
        engine.thread.run(engine.watch.mark_down(engine.replicas[0], "a test"))
        assert wait_until(lambda: "at most 62 tokens" in engine.replicas[0].reason), engine.replicas
        assert not serves(engine)
        assert wait_until(lambda: not proxy.faults["/server_info"] and serves(engine)), engine.replicas
