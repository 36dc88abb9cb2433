"""Seconds of what runs between some steps only: evaluations and checkpoints."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from megatron_hdpo.config import Recipe
from megatron_hdpo.costs.cluster import CHECKPOINT_BYTES_S, GIB
from megatron_hdpo.costs.parameters import model_values
from megatron_hdpo.data.tasks import Task
from megatron_hdpo.planner.plan import Plan, student_batch
from megatron_hdpo.planner.sampling_time import sampling

# Main weights and two moments in fp32, the weights in bfloat16.
_CHECKPOINT_BYTES = 3 * 4 + 2
_TEACHER_BYTES = {"ema": 4, "snapshot": 2}


@dataclass(frozen=True)
class Occasion:
    """Work that comes once in `every` steps. what: its name and size."""

    what: str
    every: int
    seconds: float

    def __str__(self) -> str:
        share = self.seconds / self.every
        return f"{self.what}: {self.seconds:.0f} s once in {self.every} steps, {share:.1f} s per step"


def occasions(plan: Plan, recipe: Recipe) -> list[str]:
    """Return one line of text for the evaluations and one for the checkpoints of a recipe on a plan's layout."""
    every, problems = recipe.evaluation.every, evaluation_problems(recipe)
    lines = [str(_checkpoint(plan, recipe.checkpoint.every))]
    if every is None or problems == 0:
        return lines
    if problems is None:
        unknown = "evaluation: its number of problems is not in the recipe (data.evaluation has a task without a limit)"
        return [unknown, *lines]
    return [str(_evaluation(plan, recipe, problems, every)), *lines]


def evaluation_problems(recipe: Recipe) -> int | None:
    """Return the number of problems of an evaluation, by the limits of its tasks; None if a task has no limit."""
    counts = [_problems(task) for task in recipe.data.evaluation]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _problems(task: Task) -> int | None:
    bounds = (getattr(task, "limit", None), getattr(task, "size", None))  # a task of one's own may have neither
    return min((bound for bound in bounds if bound is not None), default=None)


def _evaluation(plan: Plan, recipe: Recipe, problems: int, every: int) -> Occasion:
    """Return an evaluation: its samples, and after them a greedy response per problem."""
    config = recipe.evaluation
    passes = [(problems, 1)] if config.greedy else []
    by_samples = Counter[int]()  # tasks with equal numbers of samples are sampled together
    for task in recipe.data.evaluation:
        by_samples[config.samples_of(task.task_name)] += _problems(task) or 0
    passes += [(count, samples) for samples, count in by_samples.items()]
    longest = config.max_new_tokens or plan.workload.longest_response
    seconds = sum(_sampled_s(plan, count, samples, longest) for count, samples in passes)
    mean = sum(count * samples for count, samples in passes) / problems
    return Occasion(f"evaluation of {problems:,} problems x {mean:.4g}", every, seconds)


def _sampled_s(plan: Plan, problems: int, samples: int, longest: int) -> float:
    workload = replace(plan.workload, prompts=problems, samples=samples, longest_response=longest)
    engines = (plan.rollouts.gpus or plan.layout.world) // plan.rollouts.tensor
    batch, _ = student_batch(
        a=plan.architecture,
        cluster=plan.cluster,
        layout=plan.layout,
        workload=workload,
        rollouts=plan.rollouts,
        engines=engines,
    )
    return sampling(
        plan.architecture,
        phase="evaluation",
        batch=replace(batch, at_once=max(1.0, batch.at_once)),
        engines=engines,
        workload=workload,
        rollouts=plan.rollouts,
        cluster=plan.cluster,
    ).time_s


def _checkpoint(plan: Plan, every: int) -> Occasion:
    """Return a checkpoint; every node of the trainer writes its ranks' parts."""
    size = model_values(plan.architecture) * (_CHECKPOINT_BYTES + _TEACHER_BYTES.get(plan.workload.teacher, 0))
    nodes = max(1, plan.layout.world // plan.cluster.gpus_per_node)
    return Occasion(f"checkpoint of {size / GIB:,.0f} GiB", every, size / nodes / CHECKPOINT_BYTES_S)
