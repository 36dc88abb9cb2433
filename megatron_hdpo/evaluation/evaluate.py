"""Evaluation on held-out problems: unbiased pass@k from n samples, mean reward, and greedy pass@1.

eval/<task>/pass@<k>          mean over problems of the unbiased estimate (passk.py)
eval/<task>/greedy            share of problems that the greedy response solves
.../pass@<k>_low, _high       95 % interval of the mean over problems, of `greedy` too
.../pass@<k>_problems         number of problems that the mean is over: those with k judged samples; of `greedy` too
eval/<task>/accuracy/...      by level and source (parts.py)
eval/<task>/reward_mean       mean reward of all samples
eval/<task>/response_tokens   mean length of all samples
eval/<task>/problems, samples how many problems were asked, and how many samples were judged
eval/<task>/generation_failed, check_failed   samples, greedy ones too, that are missing; they are not counted as wrong
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from megatron_hdpo.evaluation.config import EvaluationConfig
from megatron_hdpo.evaluation.parts import left_out, parts_of
from megatron_hdpo.evaluation.passk import interval, pass_at_k
from megatron_hdpo.sampling.coordinator import RolloutCoordinator
from megatron_hdpo.sampling.sampler import Progress
from megatron_hdpo.sampling.step_rollouts import StepRollouts
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.rollouts import JudgedGroup, SamplingParams

FAILURES = ("generation_failed", "check_failed")
"""Reasons why a sample is missing."""


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
    inspect: Callable[[Responses], object] = lambda responses: None,
) -> dict[str, float]:
    """Return the `eval/<task>/...` metrics of the model that the engine serves. Collective.

    inspect: called with the responses before.
    """
    responses = sample_responses(config, problems, rollouts, progress)
    inspect(responses)
    return metrics_of(config, responses)


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
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        stop_token_ids=rollouts.stop_token_ids,
    )
    sampled = _sampled(config, problems, sampling, rollouts, progress)
    if not config.greedy:
        return Responses(sampled)
    sampling = SamplingParams(max_new_tokens=limit, temperature=0.0, stop_token_ids=rollouts.stop_token_ids)
    return Responses(sampled, rollouts.groups(problems, sampling, ("greedy",), progress))


def _sampled(
    config: EvaluationConfig,
    problems: Sequence[Problem],
    sampling: SamplingParams,
    rollouts: RolloutCoordinator,
    progress: Progress | None,
) -> StepRollouts:
    """Return the sampled groups in the order of the problems; tasks with equal numbers of samples go together."""
    counts = [config.samples_of(problem.task) for problem in problems]
    sampled, order = StepRollouts(), list[int]()
    for count in dict.fromkeys(counts):
        indices = [i for i, own in enumerate(counts) if own == count]
        chosen = [problems[i] for i in indices]
        sampled += rollouts.groups(chosen, replace(sampling, n=count), ("evaluation",), progress)
        order += indices
    return sampled.select(np.argsort(order).tolist()) if order != sorted(order) else sampled


def metrics_of(config: EvaluationConfig, responses: Responses) -> dict[str, float]:
    """Return the `eval/<task>/...` metrics of judged responses."""
    sampled, greedy = responses.sampled.outlines, responses.greedy.outlines
    return _sampled_metrics(config, sampled) | _greedy_metrics(config, greedy) | _failures([*sampled, *greedy])


def remarks(config: EvaluationConfig, responses: Responses, cause: str) -> list[str]:
    """Return what is missing in an evaluation, one line per task: failed samples, and the problems of each pass@k.

    cause: the most frequent error. [] if nothing is missing.
    """
    sampled, greedy = _by_task(responses.sampled.outlines), _by_task(responses.greedy.outlines)
    lines = []
    for task, groups in sampled.items():
        members = [*groups, *greedy.get(task, [])]
        failed = sum(g.dropped.get(reason, 0) for g in members for reason in FAILURES)
        if failed:
            asked = failed + sum(len(g.samples) for g in members)
            rates = [(f"pass@{k}", sum(len(g.samples) >= k for g in groups)) for k in config.ks_of(task)]
            over = ", ".join(f"{name} over {count}" for name, count in rates)
            lines.append(
                f"evaluation of {task}: {failed} of {asked} samples failed and were left out, most often: {cause}; "
                f"of {len(groups)} problems: {over}"
            )
        for kind, count in left_out(groups).items():
            lines.append(f"evaluation of {task}: {count} values of {kind} are too many for an accuracy of each")
    return lines


def _sampled_metrics(config: EvaluationConfig, groups: Sequence[JudgedGroup]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for task, members in _by_task(groups).items():
        counts = [_judged(config, group) for group in members]
        for k in config.ks_of(task):
            metrics |= _rate(f"eval/{task}/pass@{k}", [pass_at_k(n, c, k) for n, c in counts if n >= k])
        for part, own in parts_of(members).items():
            shares = [c / n for n, c in map(partial(_judged, config), own) if n]
            metrics |= _rate(f"eval/{task}/accuracy/{part}", shares)
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
        metrics |= _rate(f"eval/{task}/greedy", [float(right) for right in judged])
    return metrics


def _failures(groups: Sequence[JudgedGroup]) -> dict[str, float]:
    return {
        f"eval/{task}/{reason}": float(sum(group.dropped.get(reason, 0) for group in members))
        for task, members in _by_task(groups).items()
        for reason in FAILURES
    }


def _judged(config: EvaluationConfig, group: JudgedGroup) -> tuple[int, int]:
    """Return the numbers of judged samples and of right ones."""
    return len(group.samples), sum(sample.correctness >= config.success_threshold for sample in group.samples)


def _rate(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return a mean over problems, the ends of its 95 % interval and the number of problems; without any the last."""
    count = {f"{name}_problems": float(len(values))}
    if not values:
        return count
    estimate = interval(values)
    return {name: float(np.mean(values)), f"{name}_low": estimate.low, f"{name}_high": estimate.high} | count


def _by_task(groups: Sequence[JudgedGroup]) -> Mapping[str, list[JudgedGroup]]:
    by_task: dict[str, list[JudgedGroup]] = {}
    for group in groups:
        by_task.setdefault(group.problem.task, []).append(group)
    return by_task
