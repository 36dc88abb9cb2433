"""What trainer ranks do in tests with real servers: a policy on any layout, an engine on given servers, samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_policy import build_policy, joined

from megatron_hdpo.model.policy import Policy
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.rollout.build import BuiltEngine, build_engine
from megatron_hdpo.rollout.config import RolloutConfig
from megatron_hdpo.types.learning import Scoring
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.rollouts import GenerationRequest, Group, Sample, SamplingParams
from megatron_hdpo.weights.stream import stream_hf

TOP = 3
PROMPTS = [np.array([2, 3 + i, 4], dtype=np.int32) for i in range(4)]


def settings(urls: Sequence[str], **sglang: Any) -> RolloutConfig:
    """A rollout section on servers that are there."""
    return RolloutConfig.model_validate(
        {"engine": "sglang", "sglang": {"placement": "given", "urls": list(urls)} | sglang}
    )


@contextmanager
def engine_on(urls: Sequence[str], policy: Policy, model: Path, folder: Path, **sglang: Any) -> Iterator[BuiltEngine]:
    """An engine of this rank, closed at the end. Collective."""
    built = build_engine(settings(urls, **sglang), model, policy.architecture, policy.context, folder)
    try:
        yield built
    finally:
        built.engine.close()


@contextmanager
def policy_on(model: Path, **layout: int) -> Iterator[Policy]:
    """The model's policy on this rank."""
    with joined(**layout) as context:
        yield build_policy(model, context)


def scale_weights(policy: Policy, factor: float) -> None:
    """Other weights, the same on every layout."""
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(factor)


def push(built: BuiltEngine, policy: Policy, version: int) -> dict[str, float]:
    """The policy's weights into the servers; metrics."""
    return built.sync(lambda to: stream_hf(policy.model, policy.architecture, policy.context, to=to), version)


def sampled_groups(built: BuiltEngine, context: ParallelContext, temperature: float = 1.0) -> list[Group]:
    """Samples of the prompts from the servers, gathered to every rank."""
    params = SamplingParams(12, n=2, temperature=temperature, top_logprobs=TOP, stop_token_ids=(1,))
    groups: dict[str, Group] = {}
    if context.rank in built.sampling_ranks:
        mine = range(built.sampling_ranks.index(context.rank), len(PROMPTS), len(built.sampling_ranks))
        for i in mine:
            groups[f"{i}"] = Group(Problem(f"p/{i}", "p", "q", "a"), PROMPTS[i], [])
        built.engine.submit([GenerationRequest(key, group.prompt_ids, params) for key, group in groups.items()])
        for result in built.engine.results():
            if result is not None:
                assert not result.errors, result.errors
                groups[result.request_id].samples += [Sample(c, "", 0.0) for c in result.completions]
    return [group for part in context.gather_objects(groups) for group in part.values()]


def worst_difference(policy: Policy, groups: Sequence[Group], temperature: float = 1.0) -> tuple[float, float, int]:
    """(sampled log-probs, top k, tokens): largest |server - policy|; the same on every rank."""
    scorings, samples = [], {}
    for g, group in enumerate(groups):
        for s, sample in enumerate(group.samples):
            key = (g, "student", s, "x")
            samples[key] = sample.completion
            scorings.append(
                Scoring(key, group.prompt_ids, sample.completion.token_ids, "policy", TOP, temperature=temperature)
            )
    scores = policy.score(scorings)
    own, top = 0.0, 0.0
    for key, score in scores.items():
        completion = samples[key]
        own = max(own, float(np.abs(score.logprobs_T - completion.logprobs).max()))
        top = max(top, float(np.abs(score.top.logprobs_TK - completion.top_logprobs.logprobs_TK).max()))
    everyone = policy.context.gather_objects((own, top))
    tokens = sum(len(completion.token_ids) for completion in samples.values())
    return max(o for o, _ in everyone), max(t for _, t in everyone), tokens
