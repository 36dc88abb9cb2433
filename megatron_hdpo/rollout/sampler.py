"""Rollouts of problems: sampled by this rank's engine, judged while sampling goes on, failures retried and counted.

A generation or a check that failed is never a reward: it is tried again, then dropped and counted.
The sampler is local to a rank; `rollouts.py` shares the problems of a step over ranks and brings groups together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_hdpo.data.problem import Problem
from megatron_hdpo.rewards.pool import Judgement, RewardPool
from megatron_hdpo.rollout.engine import Engine
from megatron_hdpo.rollout.types import Completion, GenerationRequest, Sample, SamplingParams

OnProgress = Callable[[int], None]


@dataclass(frozen=True)
class RolloutRequest:
    """`sampling.n` rollouts of a problem after a prompt. `key` tells it from the others of its call."""

    key: str
    problem: Problem
    prompt_ids: np.ndarray
    sampling: SamplingParams
    seed: int


@dataclass
class Rollouts:
    """What came of one request: judged samples, and what was dropped, by reason."""

    samples: list[Sample] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str, count: int = 1) -> None:
        """Count rollouts that do not exist."""
        self.dropped[reason] = self.dropped.get(reason, 0) + count


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

    def sample(self, requests: Sequence[RolloutRequest], on_progress: OnProgress | None = None) -> dict[str, Rollouts]:
        """Judged rollouts by request key. `on_progress` gets the number of samples that came with each result."""
        by_id = {request.key: request for request in requests}
        tries = dict.fromkeys(by_id, 0)
        rollouts = {key: Rollouts() for key in by_id}
        judging: list[tuple[str, Completion, str, Future[Judgement]]] = []
        self.engine.submit([self._request(request, request.sampling.n, 0) for request in requests])
        for result in self.engine.results():
            key = result.request_id.rsplit("#", 1)[0]
            for completion in result.completions:
                text = self.decode(completion.token_ids)
                judging.append((key, completion, text, self.rewards.submit(by_id[key].problem, text)))
            if result.errors:
                self._retry(by_id[key], len(result.errors), tries, rollouts[key])
            if on_progress is not None:
                on_progress(len(result.completions))
        for key, completion, text, future in judging:
            judgement = future.result()
            if judgement.reward is None:
                rollouts[key].drop("check_failed")
            else:
                rollouts[key].samples.append(Sample(completion, text, judgement.reward))
        return rollouts

    def _retry(self, request: RolloutRequest, missing: int, tries: dict[str, int], rollouts: Rollouts) -> None:
        tries[request.key] += 1
        if tries[request.key] > self.max_retries:
            rollouts.drop("generation_failed", missing)
        else:
            self.engine.submit([self._request(request, missing, tries[request.key])])

    @staticmethod
    def _request(request: RolloutRequest, n: int, attempt: int) -> GenerationRequest:
        """A retry has a seed of its own: with the old one it would repeat samples that succeeded."""
        seed = request.seed if attempt == 0 else rollout_seed(request.seed, "retry", attempt)
        return GenerationRequest(f"{request.key}#{attempt}", request.prompt_ids, replace(request.sampling, n=n), seed)
