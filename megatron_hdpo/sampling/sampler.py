"""Rollouts of problems on one rank: sampled by its engine, judged meanwhile, failures retried and counted.

A generation or a check that failed is never a reward: it is tried again, then dropped and counted. `coordinator.py`
shares the problems of a step over ranks and gathers the groups.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from megatron_hdpo.parallel.stop_request import StopRequest
from megatron_hdpo.rewards.judgement import Judgement
from megatron_hdpo.rewards.pool import RewardPool
from megatron_hdpo.rollout.engine import Engine
from megatron_hdpo.sampling.failures import Failures, RewardFailed
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.rollouts import Completion, GenerationRequest, GenerationResult, Sample, SamplingParams

_STOP_POLL_S = 0.5
"""Longest time until a wait for checks notices that the run was asked to end."""


class Progress(Protocol):
    """Counter of samples for a progress bar, such as `tracking.phase.Phase`."""

    def extend(self, n: int, /) -> None:
        """Take note that n more samples were asked for; fewer, if n is negative."""

    def advance(self, n: int, /) -> None:
        """Take note that n more samples have arrived."""


class _Uncounted:
    """Progress that nobody follows."""

    def extend(self, n: int, /) -> None: ...

    def advance(self, n: int, /) -> None: ...


@dataclass(frozen=True)
class RolloutRequest:
    """Request for `sampling.n` rollouts of a problem with a prompt.

    key: unique in its call. prompt_ids: int [P]. stop_at: when a judged rollout has at least this correctness, the
    sampling of the others ends; None samples them all.
    """

    key: str
    problem: Problem
    prompt_ids: np.ndarray
    sampling: SamplingParams
    seed: int
    stop_at: float | None = None


@dataclass
class SampledRollouts:
    """Judged samples of one request, and the number of dropped ones by reason."""

    samples: list[Sample] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str, count: int = 1) -> None:
        """Count rollouts that were dropped for `reason`."""
        self.dropped[reason] = self.dropped.get(reason, 0) + count


Then = Callable[[RolloutRequest, SampledRollouts], Sequence[RolloutRequest]]
Idle = Callable[["SamplingJob"], bool]


def nothing_opened(prompt_ids: np.ndarray) -> str:
    """Return "": the prompts of models without thoughts open none."""
    return ""


def rollout_seed(*parts: object) -> int:
    """Return a 63-bit seed from what identifies a request (run seed, step, problem, purpose).

    The same after a resume and on any number of ranks.
    """
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class RolloutSampler:
    """Samples and judges the requests of one rank.

    decode: token ids to text, without special tokens. opened_by: what a prompt's ids [P] begin of the response's text,
    such as the mark of a thought; judges get it in front of the text. max_retries: retries of a request that failed.
    stop: of the run; sampling ends as soon as it is made. answers: samples, failures and judgements of all requests so
    far; a sign of life while the number grows. failures: errors of generation and checking, retried ones too.
    """

    def __init__(
        self,
        engine: Engine,
        rewards: RewardPool,
        decode: Callable[[np.ndarray], str],
        max_retries: int = 2,
        stop: StopRequest | None = None,
        opened_by: Callable[[np.ndarray], str] = nothing_opened,
    ) -> None:
        self.opened_by = opened_by
        self.engine = engine
        self.rewards = rewards
        self.decode = decode
        self.max_retries = max_retries
        self.stop = StopRequest() if stop is None else stop
        self.answers = 0
        self.failures = Failures()

    def sample(
        self,
        requests: Sequence[RolloutRequest],
        progress: Progress | None = None,
        then: Then = lambda request, rollouts: (),
    ) -> dict[str, SampledRollouts]:
        """Sample the requests to the end; return judged rollouts by request key. See `begin`."""
        done: dict[str, SampledRollouts] = {}

        def collect(request: RolloutRequest, rollouts: SampledRollouts) -> Sequence[RolloutRequest]:
            done[request.key] = rollouts
            return then(request, rollouts)

        self.begin(requests, progress, collect).run()
        return done

    def begin(
        self,
        requests: Sequence[RolloutRequest],
        progress: Progress | None = None,
        then: Then = lambda request, rollouts: (),
        idle: Idle | None = None,
    ) -> SamplingJob:
        """Return a job that samples these requests when it is `run`.

        then(request, rollouts) is called once per request, when its last rollout has been judged; the requests that it
        returns join the others at once, while those are still being sampled. progress gets the samples that are asked
        for, those of `then` too, and those that arrive; samples that are given up are taken off again. idle(job) is
        called while the engine has free slots; it may `add` requests to the job, and returns whether it did.
        """
        job = SamplingJob(self, progress, idle)
        if requests:
            job.add(requests, then)
        return job


@dataclass
class _Open:
    """State of a request that is not complete.

    part: of the job. opened: text that the prompt begins of every response. judged: outcomes in the order in which the
    samples came, so that a deterministic engine gives groups in one order however long the checks take. missing:
    samples not sampled yet.
    """

    request: RolloutRequest
    part: _Part
    opened: str
    missing: int
    judged: list[Sample | None] = field(default_factory=list)
    judging: int = 0
    ids: list[str] = field(default_factory=list)
    stopped: bool = False
    rollouts: SampledRollouts = field(default_factory=SampledRollouts)

    @property
    def name(self) -> str:
        return self.part.prefix + self.request.key


@dataclass(frozen=True)
class _Part:
    """Requests that were added together, and those that follow from them. prefix: of their names in the job."""

    prefix: str
    then: Then


@dataclass(frozen=True)
class _Check:
    name: str
    place: int
    completion: Completion
    text: str


class SamplingJob:
    """Job that samples and judges requests."""

    def __init__(self, sampler: RolloutSampler, progress: Progress | None, idle: Idle | None) -> None:
        self.sampler, self.idle = sampler, idle
        self.progress: Progress = progress or _Uncounted()
        self._open: dict[str, _Open] = {}
        self._checks: dict[Future[Judgement], _Check] = {}
        self._parts = 0
        self._runs = False

    @property
    def is_complete(self) -> bool:
        """Return whether all requests have been sampled and judged."""
        return not self._open

    def add(self, requests: Sequence[RolloutRequest], then: Then) -> None:
        """Let further requests join, whose keys may be those of earlier ones. then: as for `RolloutSampler.begin`."""
        part = _Part(f"{self._parts}:" if self._parts else "", then)
        self._parts += 1
        entries = self._opened(requests, part)
        if self._runs:
            self._submit([(entry, entry.missing, 0) for entry in entries])

    def run(self) -> None:
        """Sample and judge to the end.

        Raises EngineLostWeights when the engine must get weights first; call again after that to sample what is
        missing. Raises StopRequested when the run was asked to end, RuntimeError when the engine leaves requests
        unanswered.
        """
        self._submit([(entry, entry.missing, 0) for entry in self._open.values() if entry.missing])
        self._runs = True
        try:
            while self._open:
                for result in self.sampler.engine.results():
                    self.sampler.stop.check()
                    if result is not None:
                        self._take(result)
                    self._collect(timeout=0.0)
                    self._fill()
                if self._open and not self._checks:
                    raise RuntimeError(f"the engine never answered the requests {sorted(self._open)[:5]}")
                if not self._fill():
                    self._collect(timeout=None)
        finally:
            self._runs = False

    def _fill(self) -> bool:
        """Say that the engine has free slots, if so; return whether requests have joined."""
        if self.idle is None:
            return False
        missing = sum(entry.missing for entry in self._open.values())
        return missing < self.sampler.engine.slots and self.idle(self)

    def _submit(self, wanted: Sequence[tuple[_Open, int, int]]) -> None:
        """Submit (entry, count, failures) for each request: `count` samples after `failures` failures.

        A retry gets a seed of its own: with the old one it would repeat samples that succeeded.
        """
        attempts = []
        for entry, count, failures in wanted:
            request, suffix = entry.request, f"#{failures}"
            if entry.name + suffix in entry.ids:
                suffix += f".{len(entry.ids)}"
            seed = request.seed if not entry.ids else rollout_seed(request.seed, "retry", suffix[1:])
            entry.ids.append(entry.name + suffix)
            attempts.append(_attempt(request, entry.ids[-1], count, seed))
        if attempts:
            self.sampler.engine.submit(attempts)

    def _take(self, result: GenerationResult) -> None:
        self.sampler.answers += 1
        name, _, attempt = result.request_id.rpartition("#")
        entry = self._open[name]
        for completion in result.completions:
            text = entry.opened + self.sampler.decode(completion.token_ids)
            future = self.sampler.rewards.submit(entry.request.problem, text, len(completion.token_ids))
            self._checks[future] = _Check(name, len(entry.judged), completion, text)
            entry.judged.append(None)
            entry.judging += 1
            entry.missing -= 1
        if result.cancelled:
            entry.missing -= result.cancelled
            self.progress.extend(-result.cancelled)
            entry.rollouts.drop("stopped_early", result.cancelled)
        for error in result.errors:
            self.sampler.failures.add(f"generation failed: {error}", entry.request.problem.id)
        if result.errors:
            self._retry(entry, len(result.errors), int(attempt.partition(".")[0]))
        self.progress.advance(len(result.completions))
        self._close_if_done(entry)

    def _retry(self, entry: _Open, failed: int, failures: int) -> None:
        """Retry or drop failed samples. failures: earlier failures of these samples."""
        if failures >= self.sampler.max_retries or entry.stopped:
            entry.missing -= failed
            self.progress.extend(-failed)
            entry.rollouts.drop("generation_failed", failed)
        else:
            self._submit([(entry, failed, failures + 1)])

    def _collect(self, timeout: float | None) -> None:
        """Process the checks that have ended; with timeout None, wait for at least one.

        Raises StopRequested while it waits: a check may take minutes. Raises RewardFailed for a failure that is to end
        the run.
        """
        if not self._checks:
            return
        ended, _ = wait(self._checks, _STOP_POLL_S if timeout is None else timeout, return_when=FIRST_COMPLETED)
        while timeout is None and not ended:
            self.sampler.stop.check()
            ended, _ = wait(self._checks, _STOP_POLL_S, return_when=FIRST_COMPLETED)
        self.sampler.answers += len(ended)
        for future in ended:
            check, judgement = self._checks.pop(future), future.result()
            entry = self._open[check.name]
            entry.judging -= 1
            if judgement.reward is None:
                self._drop_unjudged(entry, judgement)
            else:
                sample = _sample(check, judgement, judgement.reward)
                entry.judged[check.place] = sample
                self._stop_early(entry, sample.correctness)
            self._close_if_done(entry)

    def _drop_unjudged(self, entry: _Open, judgement: Judgement) -> None:
        problem = entry.request.problem.id
        if judgement.ends_run:
            raise RewardFailed(f"problem {problem}: {judgement.error} (reward.functions: on_failure=stop)")
        entry.rollouts.drop(f"check_failed/{judgement.failed}" if judgement.failed else "check_failed")
        self.sampler.failures.add(f"check failed: {judgement.error}", problem)

    def _stop_early(self, entry: _Open, correctness: float) -> None:
        stop_at = entry.request.stop_at
        if stop_at is not None and correctness >= stop_at and entry.missing and not entry.stopped:
            entry.stopped = True
            self.sampler.engine.cancel(entry.ids)

    def _close_if_done(self, entry: _Open) -> None:
        if entry.missing or entry.judging:
            return
        del self._open[entry.name]
        entry.rollouts.samples = [sample for sample in entry.judged if sample is not None]
        following = self._opened(entry.part.then(entry.request, entry.rollouts), entry.part)
        self._submit([(new, new.missing, 0) for new in following])

    def _opened(self, requests: Sequence[RolloutRequest], part: _Part) -> list[_Open]:
        entries = [
            _Open(request, part, self.sampler.opened_by(request.prompt_ids), request.sampling.n) for request in requests
        ]
        self._open |= {entry.name: entry for entry in entries}
        self.progress.extend(sum(entry.missing for entry in entries))
        return entries


def _sample(check: _Check, judgement: Judgement, reward: float) -> Sample:
    return Sample(check.completion, check.text, reward, judgement.feedback, judgement.components, judgement.decided_by)


def _attempt(request: RolloutRequest, request_id: str, n: int, seed: int) -> GenerationRequest:
    sampling = replace(request.sampling, n=n)
    return GenerationRequest(request_id, request.prompt_ids, sampling, seed, request.problem.id)
