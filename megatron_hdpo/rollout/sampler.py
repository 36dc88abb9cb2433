"""Rollouts of problems: sampled by this rank's engine, judged while sampling goes on, failures retried and counted.

A generation or a check that failed is never a reward: it is tried again, then dropped and counted.
The sampler is local to a rank; `rollouts.py` shares the problems of a step over ranks and brings groups together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_hdpo.data.problem import Problem
from megatron_hdpo.rewards.pool import Judgement, RewardPool
from megatron_hdpo.rollout.engine import Engine
from megatron_hdpo.rollout.types import Completion, GenerationRequest, GenerationResult, Sample, SamplingParams

OnProgress = Callable[[int], None]


@dataclass(frozen=True)
class RolloutRequest:
    """`sampling.n` rollouts of a problem after a prompt. `key` tells it from the others of its call.

    stop_at: reward from which a judged rollout ends the sampling of the others; None samples them all.
    """

    key: str
    problem: Problem
    prompt_ids: np.ndarray
    sampling: SamplingParams
    seed: int
    stop_at: float | None = None


@dataclass
class Rollouts:
    """What came of one request: judged samples, and what was dropped, by reason."""

    samples: list[Sample] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str, count: int = 1) -> None:
        """Count rollouts that do not exist."""
        self.dropped[reason] = self.dropped.get(reason, 0) + count


Then = Callable[[RolloutRequest, Rollouts], Sequence[RolloutRequest]]


def rollout_seed(*parts: object) -> int:
    """A 63-bit seed from what identifies a request (run seed, step, problem, purpose): the same after a resume and on
    any number of ranks."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Sampler:
    """decode: token ids to text, special tokens left out. max_retries: new tries of a request that failed."""

    def __init__(
        self, engine: Engine, rewards: RewardPool, decode: Callable[[np.ndarray], str], max_retries: int = 2
    ) -> None:
        self.engine = engine
        self.rewards = rewards
        self.decode = decode
        self.max_retries = max_retries

    def sample(
        self,
        requests: Sequence[RolloutRequest],
        on_progress: OnProgress | None = None,
        then: Then = lambda request, rollouts: (),
    ) -> dict[str, Rollouts]:
        """Judged rollouts by request key.

        then(request, rollouts) is called once for each request, when its last rollout has been judged; the requests
        that it returns join the others at once, while those are still being sampled. on_progress gets the number of
        samples that came with each result.
        """
        return _Sampling(self, on_progress, then).run(requests)


@dataclass
class _Open:
    """A request on its way. judged: outcomes in the order in which the samples came, so that an engine that is
    deterministic gives groups in one order however long the checks take. missing: samples not sampled yet."""

    request: RolloutRequest
    missing: int
    judged: list[Sample | None] = field(default_factory=list)
    judging: int = 0
    tries: int = 0
    stopped: bool = False
    rollouts: Rollouts = field(default_factory=Rollouts)


@dataclass(frozen=True)
class _Check:
    key: str
    place: int
    completion: Completion
    text: str


class _Sampling:
    """One call of `Sampler.sample`."""

    def __init__(self, sampler: Sampler, on_progress: OnProgress | None, then: Then) -> None:
        self.sampler, self.on_progress, self.then = sampler, on_progress, then
        self.open: dict[str, _Open] = {}
        self.checks: dict[Future[Judgement], _Check] = {}
        self.done: dict[str, Rollouts] = {}

    def run(self, requests: Sequence[RolloutRequest]) -> dict[str, Rollouts]:
        self._begin(requests)
        while self.open:
            for result in self.sampler.engine.results():
                if result is not None:
                    self._take(result)
                self._collect(timeout=0.0)
            if self.open and not self.checks:
                raise RuntimeError(f"the engine never answered the requests {sorted(self.open)[:5]}")
            self._collect(timeout=None)
        return self.done

    def _begin(self, requests: Sequence[RolloutRequest]) -> None:
        for request in requests:
            self.open[request.key] = _Open(request, request.sampling.n)
        self.sampler.engine.submit([_attempt(request, request.sampling.n, 0) for request in requests])

    def _take(self, result: GenerationResult) -> None:
        key = result.request_id.rsplit("#", 1)[0]
        entry = self.open[key]
        for completion in result.completions:
            text = self.sampler.decode(completion.token_ids)
            future = self.sampler.rewards.submit(entry.request.problem, text)
            self.checks[future] = _Check(key, len(entry.judged), completion, text)
            entry.judged.append(None)
            entry.judging += 1
            entry.missing -= 1
        if result.cancelled:
            entry.missing -= result.cancelled
            entry.rollouts.drop("stopped_early", result.cancelled)
        if result.errors:
            self._retry(entry, len(result.errors))
        if self.on_progress is not None and result.completions:
            self.on_progress(len(result.completions))
        self._close_if_done(entry)

    def _retry(self, entry: _Open, failed: int) -> None:
        entry.tries += 1
        if entry.tries > self.sampler.max_retries or entry.stopped:
            entry.missing -= failed
            entry.rollouts.drop("generation_failed", failed)
        else:
            self.sampler.engine.submit([_attempt(entry.request, failed, entry.tries)])

    def _collect(self, timeout: float | None) -> None:
        """Take the checks that have ended; wait for one of them at least with timeout None."""
        if not self.checks:
            return
        ended, _ = wait(self.checks, timeout, return_when=FIRST_COMPLETED)
        for future in ended:
            check, judgement = self.checks.pop(future), future.result()
            entry = self.open[check.key]
            entry.judging -= 1
            if judgement.reward is None:
                entry.rollouts.drop("check_failed")
            else:
                entry.judged[check.place] = Sample(check.completion, check.text, judgement.reward, judgement.feedback)
                self._stop_early(entry, judgement.reward)
            self._close_if_done(entry)

    def _stop_early(self, entry: _Open, reward: float) -> None:
        stop_at = entry.request.stop_at
        if stop_at is not None and reward >= stop_at and entry.missing and not entry.stopped:
            entry.stopped = True
            self.sampler.engine.cancel([f"{entry.request.key}#{attempt}" for attempt in range(entry.tries + 1)])

    def _close_if_done(self, entry: _Open) -> None:
        if entry.missing or entry.judging:
            return
        del self.open[entry.request.key]
        entry.rollouts.samples = [sample for sample in entry.judged if sample is not None]
        self.done[entry.request.key] = entry.rollouts
        self._begin(self.then(entry.request, entry.rollouts))


def _attempt(request: RolloutRequest, n: int, attempt: int) -> GenerationRequest:
    """A retry has a seed of its own: with the old one it would repeat samples that succeeded."""
    seed = request.seed if attempt == 0 else rollout_seed(request.seed, "retry", attempt)
    sampling = replace(request.sampling, n=n)
    return GenerationRequest(f"{request.key}#{attempt}", request.prompt_ids, sampling, seed, request.problem.id)
