"""Samples whose reward functions fail: dropped, counted by name, and never a reason to wait for ever."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from fake_engine import FakeEngine
from reward_service import StandInService, hang, status, value_of
from thread_ranks import text_of

from megatron_hdpo.parallel.stop_request import StopRequest, StopRequested
from megatron_hdpo.rewards.config import RewardConfig
from megatron_hdpo.rewards.pool import RewardPool
from megatron_hdpo.sampling.failures import RewardFailed
from megatron_hdpo.sampling.sampler import RolloutRequest, RolloutSampler
from megatron_hdpo.training.failed_rollouts import FailedRollouts, count_failures
from megatron_hdpo.training.reward_metrics import reward_metrics
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.rollouts import Group, SamplingParams, outline_of

PROBLEM = Problem(id="task/a", task="task", question="?", answer="!")
REQUEST = RolloutRequest("a", PROBLEM, np.array([1, 2, 3], dtype=np.int32), SamplingParams(8, n=24), 7)


def pool_of(service: StandInService, **settings: Any) -> RewardPool:
    """Length and the service, so that no worker process is needed."""
    functions = [
        {"kind": "length", "max_tokens": 100, "buffer_tokens": 100, "weight": 10},
        {"kind": "http", "name": "judge", "url": service.url, "decides_success": True, **settings},
    ]
    return RewardPool([], RewardConfig.model_validate({"functions": functions, "workers": 1}))


def is_refused(text: str) -> bool:
    return text.startswith(("1", "2", "3"))


@pytest.mark.fault(
    "a reward service refuses some responses",
    phase="checking",
    seen="`reward/<name>/failed`, `rollout/check_failed`, and each cause once in the log",
    lost="these samples; they are no rewards of 0",
)
def test_they_are_dropped_and_counted_by_name() -> None:
    refuses = StandInService(lambda asked, times: status(400, "no") if is_refused(asked["response"]) else None)
    with refuses.running() as service, pool_of(service) as pool:
        sampler = RolloutSampler(FakeEngine(), pool, text_of)
        done = sampler.sample([REQUEST])["a"]
    asked = [request["response"] for request in service.asked]
    refused = sum(map(is_refused, asked))
    assert len(asked) == 24 and 0 < refused < 24
    assert done.dropped == {"check_failed/judge": refused}
    for sample in done.samples:
        length, judged = -sample.length / 100, value_of(sample.text)
        assert sample.components == {"length": length, "judge": judged}
        assert sample.reward == pytest.approx(10 * length + judged, abs=1e-12)
        assert sample.correctness == judged and sample.feedback == f"seen {sample.text}"
    group = outline_of(Group(PROBLEM, REQUEST.prompt_ids, done.samples, dropped=done.dropped))
    assert count_failures([group])["check_failed"] == refused
    metrics = reward_metrics([group])
    assert metrics.keys() == {"reward/judge", "reward/judge/failed", "reward/length", "reward/length/failed"}
    assert metrics["reward/judge/failed"] == refused / 24 and metrics["reward/length/failed"] == 0
    assert metrics["reward/judge"] == pytest.approx(np.mean([value_of(text) for text in asked if not is_refused(text)]))
    warnings: list[str] = []
    (failure,) = sampler.failures.take()
    assert (failure.text, failure.count) == ("check failed: reward function 'judge': status 400: no", refused)
    FailedRollouts(0.0, 3, warnings.append).watch(1, [group], failure.text)
    assert f"{refused} of 24 rollouts failed" in warnings[0]


def test_the_share_is_of_all_rollouts_that_were_judged() -> None:
    group = outline_of(
        Group(
            PROBLEM,
            REQUEST.prompt_ids,
            [],
            dropped={"privileged_check_failed/judge": 3, "wrong": 2, "generation_failed": 7},
        )
    )
    assert reward_metrics([group]) == {"reward/judge/failed": 3 / 5}
    assert count_failures([group])["privileged_check_failed"] == 3


@pytest.mark.fault(
    "a reward function fails, and the recipe says `on_failure: stop`",
    phase="checking",
    seen="one line with the problem and the cause, exit code 2",
    lost="the steps since the last checkpoint",
)
def test_the_run_ends_if_it_is_to() -> None:
    error = r"task/a: reward function 'judge': status 400: no \(reward.functions"
    refuses = StandInService(lambda asked, times: status(400, "no"))
    with refuses.running() as service, pool_of(service, on_failure="stop") as pool:
        sampler = RolloutSampler(FakeEngine(), pool, text_of)
        with pytest.raises(RewardFailed, match=error):
            sampler.sample([REQUEST])


@pytest.mark.fault(
    "the run is asked to end while a reward service hangs",
    phase="checking",
    seen="`ended as asked`, without waiting for the service",
    lost="nothing",
)
def test_a_stop_request_does_not_wait_for_the_service() -> None:
    stop = StopRequest()
    with stop.accepted(lambda line: None), StandInService(lambda asked, times: hang).running() as service:
        with pool_of(service) as pool:
            threading.Timer(0.5, stop.ask, ["Ctrl-C"]).start()
            begin = time.monotonic()
            with pytest.raises(StopRequested):
                RolloutSampler(FakeEngine(), pool, text_of, stop=stop).sample([REQUEST])
        assert time.monotonic() - begin < 5
