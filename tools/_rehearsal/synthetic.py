"""Rollouts of a step without a model: groups of the planner's lengths and shares, with tokens that mean nothing."""

from __future__ import annotations

import math

import numpy as np

from megatron_hdpo.costs.workload import Workload
from megatron_hdpo.planner.made_up import random_top
from megatron_hdpo.types.learning import Objective
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.rollouts import Completion, Group, Sample


def groups_of(workload: Workload, objective: Objective, vocab_size: int) -> list[Group]:
    """Return the judged groups of a step, with the privileged samples that the objective keeps."""
    groups = [_group(workload, index, vocab_size) for index in range(workload.prompts)]
    taught = 0
    for group in groups:
        wanted = objective.privileged_rollouts_for(group, 0)
        limit = objective.max_privileged_prompts
        if wanted and (limit is None or taught < limit):
            taught += 1
            _add_privileged(group, wanted, workload, objective.privileged_top_logprobs, vocab_size)
    return [objective.keep_privileged(group) for group in groups]


def _group(workload: Workload, index: int, vocab_size: int) -> Group:
    rng = np.random.default_rng(index)
    if _turns(index, workload.cliff_rate):
        right = 0
    elif _turns(index, workload.solved_rate):
        right = workload.samples
    else:
        right = max(1, workload.samples // 2)
    prompt = rng.integers(0, vocab_size, workload.prompt_tokens, dtype=np.int32)
    samples = [_sample(workload.response_tokens, s < right, rng, vocab_size) for s in range(workload.samples)]
    return Group(Problem(f"rehearsal/{index}", "rehearsal", "?", "1", "1"), prompt, samples)


def _turns(index: int, share: float) -> bool:
    """Return whether a group is one of the `share`, which are spread evenly."""
    return math.floor((index + 1) * share) > math.floor(index * share)


def _add_privileged(group: Group, count: int, workload: Workload, top_k: int, vocab_size: int) -> None:
    rng = np.random.default_rng(len(group.samples))
    right = round(count * workload.privileged_success)
    group.privileged_prompt_ids = np.ones(workload.privileged_prompt_tokens, dtype=np.int32)
    group.privileged_samples = [
        _sample(workload.response_tokens, s < right, rng, vocab_size, top_k) for s in range(count)
    ]


def _sample(length: int, right: bool, rng: np.random.Generator, vocab_size: int, top_k: int = 0) -> Sample:
    ids = rng.integers(0, vocab_size, length, dtype=np.int32)
    logprobs = np.full(length, -1.0, dtype=np.float32)
    top = random_top(length, top_k, rng) if top_k else None
    versions = np.zeros(length, dtype=np.int32)
    return Sample(Completion(ids, logprobs, "stop", versions, top), f"\\boxed{{{int(right)}}}", float(right))
