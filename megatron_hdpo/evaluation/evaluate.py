"""Evaluation on held-out problems: unbiased pass@k from n samples, mean reward, and greedy pass@1.

eval/<task>/pass@<k>          mean over problems of the unbiased estimate (passk.py)
eval/<task>/greedy            share of problems that the greedy response solves
.../pass@<k>_low, _high       95 % interval of the mean over problems, of `greedy` too
eval/<task>/reward_mean       mean reward of all samples
eval/<task>/response_tokens   mean length of all samples
eval/<task>/samples, problems how many were judged; samples that failed are left out, not counted as wrong
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_hdpo.evaluation.config import EvaluationConfig
from megatron_hdpo.evaluation.passk import interval, pass_at_k
from megatron_hdpo.sampling.coordinator import RolloutCoordinator
from megatron_hdpo.sampling.sampler import Progress
from megatron_hdpo.sampling.step_rollouts import StepRollouts
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.rollouts import JudgedGroup, SamplingParams


@dataclass(frozen=True)
class Responses:
    """Judged responses to the problems of an evaluation. greedy: one per problem; empty where it is not asked for."""

    sampled: StepRollouts
    greedy: StepRollouts = field(default_factory=StepRollouts)


def evaluate(
    config: EvaluationConfig,
    problems: Sequence[Problem],
    rollouts: RolloutCoordinator,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Return the `eval/<task>/...` metrics of the model that the engine serves. Collective."""
    return metrics_of(config, sample_responses(config, problems, rollouts, progress))


def sample_responses(
    config: EvaluationConfig,
    problems: Sequence[Problem],
    rollouts: RolloutCoordinator,
    progress: Progress | None = None,
) -> Responses:
    """Return the responses of the model that the engine serves.

    Every evaluation samples with the same seeds, so that steps and runs can be compared. Collective.
    """
    limit = config.max_new_tokens or rollouts.config.max_new_tokens
    sampling = SamplingParams(
        max_new_tokens=limit,
        n=config.samples,
        temperature=config.temperature,
        top_p=config.top_p,
        stop_token_ids=rollouts.stop_token_ids,
    )
    sampled = rollouts.groups(problems, sampling, ("evaluation",), progress)
    if not config.greedy:
        return Responses(sampled)
    sampling = SamplingParams(max_new_tokens=limit, temperature=0.0, stop_token_ids=rollouts.stop_token_ids)
    return Responses(sampled, rollouts.groups(problems, sampling, ("greedy",), progress))


def metrics_of(config: EvaluationConfig, responses: Responses) -> dict[str, float]:
    """Return the `eval/<task>/...` metrics of judged responses."""
    return _sampled_metrics(config, responses.sampled.outlines) | _greedy_metrics(config, responses.greedy.outlines)


def _sampled_metrics(config: EvaluationConfig, groups: Sequence[JudgedGroup]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for task, members in _by_task(groups).items():
        counts = [(len(g.samples), sum(s.correctness >= config.success_threshold for s in g.samples)) for g in members]
        for k in config.k:
            enough = [(n, c) for n, c in counts if n >= k]
            if enough:
                metrics |= _with_interval(f"eval/{task}/pass@{k}", [pass_at_k(n, c, k) for n, c in enough])
        rewards = [s.reward for g in members for s in g.samples]
        if rewards:
            metrics[f"eval/{task}/reward_mean"] = float(np.mean(rewards))
            lengths = [s.length for g in members for s in g.samples]
            metrics[f"eval/{task}/response_tokens"] = float(np.mean(lengths))
        metrics[f"eval/{task}/samples"] = float(len(rewards))
        metrics[f"eval/{task}/problems"] = float(len(members))
    return metrics


def _greedy_metrics(config: EvaluationConfig, groups: Sequence[JudgedGroup]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for task, members in _by_task(groups).items():
        judged = [g.samples[0].correctness >= config.success_threshold for g in members if g.samples]
        if judged:
            metrics |= _with_interval(f"eval/{task}/greedy", [float(right) for right in judged])
    return metrics


def _with_interval(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return the mean over problems and the ends of its 95 % interval as three metrics."""
    estimate = interval(values)
    return {name: float(np.mean(values)), f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def _by_task(groups: Sequence[JudgedGroup]) -> Mapping[str, list[JudgedGroup]]:
    by_task: dict[str, list[JudgedGroup]] = {}
    for group in groups:
        by_task.setdefault(group.problem.task, []).append(group)
    return by_task
