"""The sampler: failures are tried again, dropped and counted, and never become a reward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_engine import Fails, FakeEngine
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from thread_ranks import Judge, text_of

from megatron_hdpo.objectives.base import ObjectiveDeps
from megatron_hdpo.objectives.hdpo import HDPO, HDPOConfig
from megatron_hdpo.rewards.config import RewardConfig
from megatron_hdpo.rewards.pool import RewardPool
from megatron_hdpo.sampling.sampler import RolloutRequest, RolloutSampler, SampledRollouts, _attempt, rollout_seed
from megatron_hdpo.types.load_report import LoadReport
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.rollouts import GenerationRequest, GenerationResult, Group, SamplingParams
from megatron_hdpo.types.task import TaskBase


def request(key: str, n: int = 4, seed: int = 7) -> RolloutRequest:
    problem = Problem(id=f"task/{key}", task="task", question="?", answer="!")
    return RolloutRequest(key, problem, np.array([1, 2, 3], dtype=np.int32), SamplingParams(8, n=n), seed)


def sampler(engine: FakeEngine, judge: Any = None, max_retries: int = 2) -> RolloutSampler:
    return RolloutSampler(engine, judge or Judge(), text_of, max_retries)


def first_try(request: GenerationRequest) -> bool:
    return request.request_id.endswith("#0")


@pytest.mark.fault("a sample fails", phase="sampling", seen="a line in the log", lost="nothing")
def test_failed_samples_are_tried_again_with_another_seed() -> None:
    engine = FakeEngine(lambda request, index: first_try(request) and index in (1, 2))
    done = sampler(engine).sample([request("a"), request("b", seed=8)])
    whole = sampler(FakeEngine()).sample([request("a"), request("b", seed=8)])
    for key in "ab":
        assert done[key].dropped == {}
        first, again = [r for r in engine.seen if r.request_id.startswith(f"{key}#")]
        assert (first.sampling.n, again.sampling.n) == (4, 2)  # only what is missing is asked for again
        assert first.seed != again.seed and first.sampling.max_new_tokens == again.sampling.max_new_tokens
        texts = [sample.text for sample in done[key].samples]
        assert len(texts) == 4
        kept = [sample.text for i, sample in enumerate(whole[key].samples) if i not in (1, 2)]
        assert set(kept) <= set(texts)  # what succeeded is kept
        with_old_seed = FakeEngine()._completion(first, 0)
        assert text_of(with_old_seed.token_ids) in kept and len(set(texts)) == 4  # and not sampled twice


def test_what_the_task_says_of_a_response_comes_with_its_sample() -> None:
    samples = sampler(FakeEngine()).sample([request("a", n=12)])["a"].samples
    assert {s.reward for s in samples} == {0.0, 1.0}
    assert all(s.feedback == (None if s.reward else f"not {s.text}") for s in samples)


@pytest.mark.parametrize("max_retries", [0, 1, 3])
@pytest.mark.fault(
    "a sample fails at every try",
    phase="sampling",
    seen="`rollout/generation_failed`",
    lost="that sample; it is no reward of 0",
)
def test_after_the_last_retry_they_are_dropped_and_counted(max_retries: int) -> None:
    engine = FakeEngine(lambda request, index: request.request_id.startswith("a#") and index == 0)
    done = sampler(engine, max_retries=max_retries).sample([request("a"), request("b")])
    assert [r.request_id for r in engine.seen if r.request_id.startswith("a#")] == [
        f"a#{attempt}" for attempt in range(max_retries + 1)
    ]
    assert (len(done["a"].samples), done["a"].dropped) == (3, {"generation_failed": 1})
    assert (len(done["b"].samples), done["b"].dropped) == (4, {})


@pytest.mark.fault(
    "all samples of a prompt fail",
    phase="sampling",
    seen="`rollout/generation_failed`",
    lost="that group; it is no cliff",
)
def test_a_group_without_samples_is_no_cliff() -> None:
    done = sampler(FakeEngine(lambda request, index: True)).sample([request("a")])["a"]
    assert (done.samples, done.dropped) == ([], {"generation_failed": 4})
    group = Group(request("a").problem, request("a").prompt_ids, done.samples, dropped=done.dropped)
    objective = HDPO(HDPOConfig(), ObjectiveDeps())
    assert objective.privileged_rollouts_for(group, 0) == 0 and not objective.is_cliff(group)
    assert "rollout/cliff_rate" not in objective.metrics([group])
    assert objective.examples([group], {}) == []


@pytest.mark.fault(
    "a check fails",
    phase="checking",
    seen="`rollout/check_failed`, and each kind of error once in the log",
    lost="that sample; it is no reward of 0",
)
def test_a_failed_check_is_no_reward() -> None:
    done = sampler(FakeEngine(), Judge(lambda text: text.startswith(("1", "2", "3")))).sample([request("a", n=40)])["a"]
    failed = [text_of(FakeEngine()._completion(_attempt(request("a"), "a#0", 40, 7), i).token_ids) for i in range(40)]
    expected = sum(text.startswith(("1", "2", "3")) for text in failed)
    assert 0 < expected < 40 and done.dropped == {"check_failed": expected}
    assert len(done.samples) == 40 - expected
    assert all(sample.reward == len(sample.text) % 2 for sample in done.samples)
    assert not any(sample.text.startswith(("1", "2", "3")) for sample in done.samples)


class HangingTask(TaskBase):
    """Its check of odd responses never ends."""

    def default_name(self) -> str:
        return "task"

    def problems(self, report: LoadReport) -> list[Problem]:
        return []

    def score(self, problem: Problem, response: str) -> float:
        while len(response) % 2:
            pass
        return 1.0


@pytest.mark.fault(
    "a check never ends",
    phase="checking",
    seen="`rollout/check_failed` after `reward.time_limit_s`",
    lost="that sample",
)
def test_a_check_that_hangs_is_dropped_and_counted() -> None:
    config = RewardConfig(workers=1, time_limit_s=0.5, max_retries=0)
    with RewardPool([HangingTask()], config) as pool:
        done = sampler(FakeEngine(), pool).sample([request("a", n=4)])["a"]
    texts = [s.text for s in sampler(FakeEngine()).sample([request("a", n=4)])["a"].samples]
    hanging = sum(len(text) % 2 for text in texts)
    assert 0 < hanging < 4 and done.dropped == {"check_failed": hanging}
    assert [(s.text, s.reward) for s in done.samples] == [(text, 1.0) for text in texts if len(text) % 2 == 0]


@st.composite
def failures(draw: DrawFn) -> Fails:
    bad = draw(st.sets(st.tuples(st.sampled_from(["a#0", "a#1", "a#2", "b#0", "b#1", "b#2"]), st.integers(0, 4))))
    return lambda request, index: (request.request_id, index) in bad


@settings(max_examples=50, deadline=None)
@given(failures(), st.integers(0, 3), st.integers(0, 3))
def test_every_sample_that_was_asked_for_is_there_or_counted(fails: Fails, retries: int, modulus: int) -> None:
    judge = Judge(lambda text: modulus > 0 and sum(map(ord, text)) % (modulus + 1) == 0)
    done = sampler(FakeEngine(fails), judge, retries).sample([request("a", n=5), request("b", n=3, seed=9)])
    assert {key: len(r.samples) + sum(r.dropped.values()) for key, r in done.items()} == {"a": 5, "b": 3}
    assert all(sample.reward == len(sample.text) % 2 for r in done.values() for sample in r.samples)


def test_what_follows_a_request_starts_while_others_are_sampled() -> None:
    """The second request is asked for as soon as the first is judged; nothing waits for the slow one."""
    engine, order = FakeEngine(), []

    def then(done: RolloutRequest, rollouts: SampledRollouts) -> list[RolloutRequest]:
        order.append((done.key, len(rollouts.samples)))
        return [request("b/again", n=2)] if done.key == "b" else []

    done = sampler(engine).sample([request("a"), request("b")], then=then)
    assert order.index(("b", 4)) < order.index(("b/again", 2)) and ("a", 4) in order
    assert {key: len(r.samples) for key, r in done.items()} == {"a": 4, "b": 4, "b/again": 2}
    assert [r.request_id for r in engine.seen] == ["a#0", "b#0", "b/again#0"]


class PiecemealEngine(FakeEngine):
    """Hands over one sample at a time, and remembers what was cancelled."""

    def __init__(self) -> None:
        super().__init__()
        self.cancelled: list[str] = []

    def cancel(self, request_ids: Sequence[str]) -> None:
        self.cancelled += request_ids

    def results(self) -> Iterator[GenerationResult | None]:
        for result in super().results():
            for i, completion in enumerate(result.completions):
                if result.request_id in self.cancelled:
                    yield GenerationResult(result.request_id, [], cancelled=len(result.completions) - i)
                    break
                yield GenerationResult(result.request_id, [completion])
                yield None


def test_one_right_rollout_may_stop_its_group() -> None:
    engine = PiecemealEngine()
    judge = Judge()
    wanted = replace(request("a", n=30), stop_at=1.0)
    done = sampler(engine, judge).sample([wanted, request("b")])
    rewards = [sample.reward for sample in done["a"].samples]
    assert rewards.count(1.0) == 1 and rewards[-1] == 1.0, "the samples before the right one stay"
    assert done["a"].dropped == {"stopped_early": 30 - len(rewards)}
    assert engine.cancelled == ["a#0"] and len(done["b"].samples) == 4


class Counter:
    """Progress of a sampling; the largest share of what was asked for at any time."""

    def __init__(self) -> None:
        self.asked = self.came = 0

    def extend(self, n: int, /) -> None:
        self.asked += n

    def advance(self, n: int, /) -> None:
        self.came += n
        assert self.came <= self.asked, "more came than was asked for"


def test_progress_counts_what_is_asked_for_and_what_came() -> None:
    progress = Counter()
    engine = FakeEngine(lambda request, index: first_try(request) and index == 0)

    def then(done: RolloutRequest, rollouts: SampledRollouts) -> list[RolloutRequest]:
        return [request("b/again", n=2)] if done.key == "b" else []

    sampler(engine).sample([request("a"), request("b")], progress, then)
    assert (progress.asked, progress.came) == (10, 10)


def test_progress_reaches_its_end_when_samples_are_given_up() -> None:
    progress = Counter()
    sampler(FakeEngine(lambda request, index: index == 0)).sample([request("a")], progress)
    assert progress.asked == progress.came == 3
    stopped = Counter()
    done = sampler(PiecemealEngine()).sample([replace(request("a", n=30), stop_at=1.0)], stopped)
    assert stopped.asked == stopped.came == len(done["a"].samples) < 30


def test_nothing_asked_nothing_done() -> None:
    engine = FakeEngine()
    assert sampler(engine).sample([]) == {} and engine.seen == []


def test_seeds_are_fixed_and_distinct() -> None:
    """The number below is the promise that an old run replays: it may not change between versions or machines."""
    assert rollout_seed(0, "train", 3, "sums/17") == 481342107883153101
    parts = [
        (seed, purpose, step, p) for seed in (0, 1) for purpose in ("train", "x") for step in (1, 11) for p in "ab"
    ]
    seeds = {rollout_seed(*part) for part in parts}
    assert len(seeds) == len(parts) and all(0 <= seed < 2**63 for seed in seeds)
