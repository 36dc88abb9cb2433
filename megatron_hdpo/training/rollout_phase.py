"""Rollouts of a step: sampled and judged, or replayed; then checked and saved."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_hdpo.model.policy import TrainingError
from megatron_hdpo.sampling.failures import most_frequent
from megatron_hdpo.sampling.refill import refilled, with_signal
from megatron_hdpo.sampling.replay_check import check_replayed
from megatron_hdpo.sampling.saved import read_share, step_files
from megatron_hdpo.sampling.saver import RolloutSaver
from megatron_hdpo.sampling.step_rollouts import StepRollouts, gather_counts, gather_outlines
from megatron_hdpo.tracking.formats import amount
from megatron_hdpo.training.failed_rollouts import count_failures
from megatron_hdpo.training.reward_metrics import reward_metrics
from megatron_hdpo.training.run import Run
from megatron_hdpo.types.errors import DataError
from megatron_hdpo.types.metrics import Metric, reduce_metrics
from megatron_hdpo.types.rollouts import Group, GroupOutline


def collect_step_rollouts(run: Run) -> tuple[StepRollouts, dict[str, float]]:
    """Return the groups that the next step learns from, and metrics of all sampled groups. Collective.

    The groups are judged and hold their privileged rollouts. Raises TrainingError when an engine missed a weight
    update or all rollouts have failed for too long, DataError when rollouts to replay cannot be read.
    """
    rollout = run.recipe.rollout
    server_metrics: dict[str, float] = {}
    if rollout.replay is not None:
        rollouts = _replayed(rollout.replay, run)
    else:
        ready = {"rollout/steps_ready": Metric(run.prefetched.ready, "min")} if rollout.ahead else {}
        rollouts = _sampled(run)
        server_metrics = reduce_metrics(run.context.gather_objects(run.engine.metrics() | ready))
        check_versions(rollouts.outlines, run.step, rollout.ahead)
        cause = most_frequent(run.context.gather_objects(run.coordinator.sampler.failures.take()))
        run.failed_rollouts.watch(run.step + 1, rollouts.outlines, cause)
        if rollout.ahead:
            server_metrics |= staleness_metrics(rollouts.outlines, run.step)
        if run.saver is not None:
            run.saver.save(run.step + 1, rollouts)
            run.context.barrier("rollouts handed to be saved")  # a slow disk may make a rank wait
        run.measurements.performance.rollouts(rollouts.outlines)
    counts = gather_counts(rollouts, run.objective, run.context)
    metrics = rollout_metrics(rollouts.outlines) | reward_metrics(rollouts.outlines)
    metrics |= run.objective.metrics(rollouts.outlines, counts) | server_metrics
    if run.saver is not None:
        metrics["rollout/save_failed"] = float(not_saved(run.saver, run))
    if rollout.refill_rounds:
        sampled = len(rollouts)
        rollouts = with_signal(rollouts, rollout.prompts_per_step, run.objective, run.context)
        metrics |= {"rollout/groups": float(sampled), "rollout/groups_with_signal": float(len(rollouts))}
    return rollouts, metrics


def _sampled(run: Run) -> StepRollouts:
    """Return the groups of the next step, with those that dynamic sampling adds."""
    rollout, size = run.recipe.rollout, run.recipe.rollout.prompts_per_step
    with run.console.phase("rollout", total=0, unit="sample") as phase, ExitStack() as stack:
        phase.note(_whose_samples(run))
        rollouts = run.prefetched.take(run.step, run.objective, phase)

        def sample_more(turn: int, count: int, leave_out: Collection[str]) -> StepRollouts:
            stack.enter_context(run.prefetched.paused())  # until the last round
            more = run.data.order.further(run.step, turn, count, leave_out)
            return run.coordinator.step(more, run.step, run.objective, phase)

        return refilled(rollouts, rollout.refill_rounds, size, run.objective, run.context, sample_more)


def _whose_samples(run: Run) -> str:
    """Return whose samples the console counts, and how many of the steps that were begun ahead are complete."""
    ahead = run.prefetched
    ready = f"{ahead.ready} of {ahead.begun} steps ready" if ahead.begun else ""
    return " ".join(part for part in (ready, run.whose_samples) if part)


def _replayed(folder: Path, run: Run) -> StepRollouts:
    """Return the saved groups of the next step, of which each rank reads its share. Collective."""
    context, held, problem = run.context, {}, None
    try:
        files = step_files(folder, run.step + 1)
        if not files:
            raise DataError(f"{folder} has no rollouts of step {run.step + 1}")
        held = read_share(files, context.rank, context.world_size)
        for group in held.values():
            check_replayed(group, run.architecture.vocab_size, str(files[0].parent))
            check_experts(group, _expert_sizes(run), folder)
    except (OSError, ValueError) as error:
        problem = str(error)
    context.barrier("saved rollouts read")
    for found in context.gather_objects(problem):
        if found is not None:
            raise DataError(f"rollout.replay: {found}")
    return gather_outlines(held, context)


def _expert_sizes(run: Run) -> tuple[int, int] | None:
    """Return (layers, experts per token) where the run replays the routing."""
    architecture = run.architecture
    return (architecture.num_layers, architecture.experts_per_token) if run.recipe.rollout.routing_replay else None


def check_experts(group: Group, sizes: tuple[int, int] | None, path: Path) -> None:
    """Check or drop the routed experts of replayed student rollouts.

    sizes: (layers, experts per token) when the run replays the routing, else None: then the experts are dropped. path:
    for the message. Raises DataError when experts are missing or have another shape.
    """
    for sample in group.samples:
        experts = sample.completion.routed_experts
        if sizes is None:
            sample.completion = replace(sample.completion, routed_experts=None)
            continue
        wanted = (len(group.prompt_ids) + sample.length - 1, *sizes)
        if experts is None or experts.shape != wanted:
            has = "no experts" if experts is None else f"experts of shape {experts.shape}, not {wanted},"
            raise DataError(f"{path}: problem {group.problem.id} has {has} for rollout.routing_replay")


def flush_saved_rollouts(run: Run) -> None:
    """Wait until all rollouts are saved, and say how many could not be. Collective."""
    if run.saver is not None:
        run.saver.flush()
        run.context.barrier("rollouts saved")  # a slow disk may take long
        not_saved(run.saver, run)


def not_saved(saver: RolloutSaver, run: Run) -> int:
    """Return how many groups, of all ranks, could not be saved since the last call, and say so. Collective."""
    parts = run.context.gather_objects(saver.take_not_saved())
    groups = sum(part.groups for part in parts)
    if groups:
        reason = next(part.reason for part in parts if part.groups)
        run.console.warn(f"rollouts of {amount(groups, 'group')} could not be saved: {reason}")
    return groups


def check_versions(groups: Sequence[GroupOutline], version: int, ahead: int = 0) -> None:
    """Raise TrainingError when a token was sampled by weights of a wrong version.

    Allowed are versions from `version - ahead` to `version`. Tokens of weights that are not this run's have a negative
    version.
    """
    for group in groups:
        for sample in (*group.samples, *group.privileged_samples):
            oldest, newest = sample.versions
            if oldest < max(version - ahead, 0) or newest > version:
                wanted = f"{version - ahead} to {version}" if ahead else str(version)
                raise TrainingError(
                    f"step {version}: problem {group.problem.id} was answered by weights of version "
                    f"{sorted({oldest, newest})}, not {wanted}: the engine missed a weight update"
                )


def rollout_metrics(groups: Sequence[GroupOutline]) -> dict[str, float]:
    """Return rewards and lengths of the student rollouts, and failures of all; a mean over nothing is left out."""
    samples = [sample for group in groups for sample in group.samples]
    metrics = {"rollout/samples": float(len(samples))}
    metrics |= {f"rollout/{reason}": float(count) for reason, count in count_failures(groups).items()}
    if samples:
        metrics["rollout/reward_mean"] = float(np.mean([sample.reward for sample in samples]))
        metrics["rollout/response_tokens"] = float(np.mean([sample.length for sample in samples]))
        truncated = [sample.finish_reason == "length" for sample in samples]
        metrics["rollout/truncated_rate"] = float(np.mean(truncated))
        mixed = [oldest != newest for oldest, newest in (sample.versions for sample in samples)]
        metrics["rollout/mixed_versions_rate"] = float(np.mean(mixed))
        logprobs, tokens = (sum(column) for column in zip(*((s.logprob_sum, s.length) for s in samples), strict=True))
        metrics["rollout/nll"] = -logprobs / tokens
    return metrics


def staleness_metrics(groups: Sequence[GroupOutline], version: int) -> dict[str, float]:
    """Return by how many steps the weights that sampled the student rollouts are older than those that learn from them.

    The mean is over tokens. version: of the weights that learn.
    """
    samples = [sample for group in groups for sample in group.samples if sample.length]
    if not samples:
        return {}
    mean = version - sum(sample.version_sum for sample in samples) / sum(sample.length for sample in samples)
    oldest = min(sample.versions[0] for sample in samples)
    return {"rollout/staleness_mean": mean, "rollout/staleness_max": float(version - oldest)}


def begin_next_rollouts(run: Run) -> None:
    """Begin the next steps if rollouts are sampled ahead; with none to sample, let the engine free GPU memory.

    The weights are those of `run.step`: a step that is begun `rollout.ahead` steps later than it is that old at most.
    """
    rollout = run.recipe.rollout
    if rollout.replay is not None:
        return
    for step in range(run.step + 1, min(run.step + 1 + rollout.ahead, run.recipe.train.steps)):
        run.prefetched.begin(step, run.objective)
    if not run.prefetched.begun:
        run.engine.make_room()
