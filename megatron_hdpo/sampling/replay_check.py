"""Check of saved rollouts before a run learns from them: files may come from another model, or from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_hdpo.types.errors import DataError
from megatron_hdpo.types.rollouts import Group, Sample

_ROUNDING = 1e-2
"""Nats by which a log-prob may be above 0."""


def check_replayed(group: Group, vocab_size: int, where: str) -> None:
    """Raise DataError, which begins with `where`, for a group that no engine could have sampled from this model."""
    if (reason := next(_reasons(group, vocab_size), None)) is not None:
        raise DataError(f"{where}: problem {group.problem.id}: {reason}")


def _reasons(group: Group, vocab_size: int) -> Iterator[str]:
    if not group.samples and not group.dropped:
        yield "the group has no rollouts, and says of none why it is missing"
    if group.privileged_samples and group.privileged_prompt_ids is None:
        yield "it has privileged rollouts without their prompt"
    for name, ids in (("prompt", group.prompt_ids), ("privileged prompt", group.privileged_prompt_ids)):
        if ids is not None:
            yield from _wrong_ids(name, ids, vocab_size)
    for number, sample in enumerate((*group.samples, *group.privileged_samples), start=1):
        yield from (f"rollout {number}: {reason}" for reason in _wrong_sample(sample, vocab_size))


def _wrong_sample(sample: Sample, vocab_size: int) -> Iterator[str]:
    completion, tops = sample.completion, sample.completion.top_logprobs
    yield from _wrong_ids("response", completion.token_ids, vocab_size)
    for name, reward in {"reward": sample.reward, **sample.components}.items():
        if not np.isfinite(reward):
            yield f"the {name} is {reward}"
    yield from _wrong_logprobs("log-probs", completion.logprobs)
    if not np.issubdtype(completion.weight_versions.dtype, np.integer):
        yield "the versions of the weights are no whole numbers"
    if tops is not None:
        if tops.ids_TK.shape != tops.logprobs_TK.shape or tops.ids_TK.ndim != 2:
            yield f"its most likely tokens have the shapes {tops.ids_TK.shape} and {tops.logprobs_TK.shape}"
        yield from _wrong_ids("list of most likely tokens", tops.ids_TK.ravel(), vocab_size)
        yield from _wrong_logprobs("log-probs of the most likely tokens", tops.logprobs_TK)


def _wrong_ids(name: str, ids: np.ndarray, vocab_size: int) -> Iterator[str]:
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        yield f"the {name} is an array of shape {ids.shape} and type {ids.dtype}, not a list of token ids"
    elif not len(ids):
        yield f"the {name} has no tokens"
    elif ids.min() < 0 or ids.max() >= vocab_size:
        wrong = ids.min() if ids.min() < 0 else ids.max()
        yield f"the {name} has the token {wrong}, which the model's vocabulary of {vocab_size} lacks: of another model?"


def _wrong_logprobs(name: str, logprobs: np.ndarray) -> Iterator[str]:
    if not np.issubdtype(logprobs.dtype, np.floating):
        yield f"the {name} are of type {logprobs.dtype}"
    elif not np.isfinite(logprobs).all() or (logprobs > _ROUNDING).any():
        yield f"the {name} are not all finite numbers of at most 0"
