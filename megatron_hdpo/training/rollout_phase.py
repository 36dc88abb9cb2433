"""Rollouts of a step: sampled and judged, or replayed; then checked and saved."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_hdpo.model.policy import TrainingError
from megatron_hdpo.sampling.delivery import deliver_to_leader
from megatron_hdpo.sampling.refill import refilled, with_signal
from megatron_hdpo.sampling.saved import read_groups, write_groups
from megatron_hdpo.sampling.step_rollouts import StepRollouts, gather_counts, on_every_rank
from megatron_hdpo.training.run import Run, rollouts_file
from megatron_hdpo.types.errors import DataError
from megatron_hdpo.types.rollouts import Group, GroupOutline


def collect_step_rollouts(run: Run) -> tuple[StepRollouts, dict[str, float]]:
    """Return the groups that the next step learns from, and metrics of all sampled groups. Collective.

    The groups are judged and hold their privileged rollouts. Raises TrainingError when an engine missed a weight
    update, DataError when rollouts to replay cannot be read.
    """
    rollout = run.recipe.rollout
    file = rollouts_file(run.step + 1)
    if rollout.replay is not None:
        rollouts = on_every_rank(_replayed(rollout.replay / file, run))
    else:
        rollouts = _sampled(run)
        check_versions(rollouts.outlines, run.step, rollout.ahead)
        if rollout.save:
            groups = deliver_to_leader(rollouts, run.context)
            if run.context.is_leader:
                _save_rollouts(run.recipe.output / "rollouts" / file, groups, run)
            run.context.barrier("rollouts saved")
        run.measurements.performance.rollouts(rollouts.outlines)
    counts = gather_counts(rollouts, run.objective, run.context)
    metrics = rollout_metrics(rollouts.outlines) | run.objective.metrics(rollouts.outlines, counts)
    if rollout.refill_rounds:
        sampled = len(rollouts)
        rollouts = with_signal(rollouts, rollout.prompts_per_step, run.objective, run.context)
        metrics |= {"rollout/groups": float(sampled), "rollout/groups_with_signal": float(len(rollouts))}
    return rollouts, metrics


def _sampled(run: Run) -> StepRollouts:
    """Return the groups of the next step, with those that dynamic sampling adds."""
    rollout, size = run.recipe.rollout, run.recipe.rollout.prompts_per_step
    problems = run.data.order.batch(run.step, size)
    with run.console.phase("rollout", total=0, unit="sample") as phase:
        phase.note(run.whose_samples)
        rollouts = run.prefetched.take(problems, run.step, run.objective, phase)

        def sample_more(turn: int, count: int, leave_out: Collection[str]) -> StepRollouts:
            more = run.data.order.further(run.step, turn, count, leave_out)
            return run.coordinator.step(more, run.step, run.objective, phase)

        return refilled(rollouts, rollout.refill_rounds, size, run.objective, run.context, sample_more)


def _replayed(path: Path, run: Run) -> list[Group]:
    try:
        groups = read_groups(path)
    except (OSError, ValueError) as error:
        raise DataError(f"rollout.replay: {error}") from error
    architecture = run.architecture
    sizes = (architecture.num_layers, architecture.experts_per_token) if run.recipe.rollout.routing_replay else None
    for group in groups:
        check_experts(group, sizes, path)
    return groups


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
            raise DataError(f"rollout.replay: {path}: problem {group.problem.id} has {has} for rollout.routing_replay")


def _save_rollouts(path: Path, groups: Sequence[Group], run: Run) -> None:
    """Write the step's rollouts, replacing those of an earlier try: a resumed run may repeat a step."""
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    write_groups(partial, groups, run.decode)
    partial.replace(path)


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
    """Return rewards, lengths and failures of the student rollouts; a mean over nothing is left out."""
    samples = [sample for group in groups for sample in group.samples]
    metrics = {"rollout/samples": float(len(samples))}
    for reason in ("generation_failed", "check_failed"):
        metrics[f"rollout/{reason}"] = float(sum(group.dropped.get(reason, 0) for group in groups))
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


def begin_next_rollouts(run: Run) -> None:
    """Begin to sample the next step if rollouts are sampled ahead; otherwise let the engine free GPU memory."""
    rollout = run.recipe.rollout
    if rollout.replay is not None:
        return
    if rollout.ahead and run.step + 1 < run.recipe.train.steps:
        problems = run.data.order.batch(run.step + 1, rollout.prompts_per_step)
        run.prefetched.begin(problems, run.step + 1, run.objective)
    else:
        run.engine.make_room()
