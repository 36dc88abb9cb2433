"""Hand-made groups: rewards in, token ids that no two samples share unless they are meant to."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import numpy as np

from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.rollouts import Completion, Group, Sample, TopKArrays

_next_id = count(100)


def sample(
    reward: float,
    length: int = 3,
    *,
    text: str = "so it is 4",
    cut: bool = False,
    token_ids: Sequence[int] | None = None,
    top: TopKArrays | None = None,
) -> Sample:
    """A judged rollout; log-probs -0.5, -1.0, ... per token."""
    ids = np.array([next(_next_id) for _ in range(length)] if token_ids is None else token_ids, dtype=np.int32)
    logprobs = -0.5 * np.arange(1, len(ids) + 1, dtype=np.float32)
    versions = np.zeros(len(ids), dtype=np.int32)
    completion = Completion(ids, logprobs, "length" if cut else "stop", versions, top)
    return Sample(completion, text, reward)


def group(
    rewards: Sequence[float | Sample], privileged: Sequence[Sample] = (), problem: str = "sums/0", prompt: int = 7
) -> Group:
    """A group whose prompt is [prompt, 1, 2] and whose privileged prompt is [prompt, 8, 8, 8]."""
    samples = [reward if isinstance(reward, Sample) else sample(reward) for reward in rewards]
    return Group(
        Problem(problem, "sums", "2 + 2?", "4"),
        np.array([prompt, 1, 2], dtype=np.int32),
        samples,
        np.array([prompt, 8, 8, 8], dtype=np.int32) if privileged else None,
        list(privileged),
    )


def top(length: int, k: int = 3, seed: int = 0) -> TopKArrays:
    """k distinct ids and log-probs per row, rows all different."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(11)[:k] for _ in range(length)]).astype(np.int32)
    logprobs = -np.sort(rng.uniform(0.1, 3.0, (length, k)), axis=-1).astype(np.float32)
    return TopKArrays(ids, logprobs)
