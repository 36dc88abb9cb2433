"""Measurements of a run: profiler, performance, stragglers and health."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_hdpo.config import Recipe
from megatron_hdpo.health.stragglers import StragglerWatch
from megatron_hdpo.model.config import choose_spec
from megatron_hdpo.model.overlap import overlaps
from megatron_hdpo.model.policy import Policy
from megatron_hdpo.planner.from_recipe import layout_of
from megatron_hdpo.tracking.communication import TrainingTraffic
from megatron_hdpo.tracking.console import Console
from megatron_hdpo.tracking.performance import Performance, device_peak
from megatron_hdpo.tracking.profile import StepProfiler
from megatron_hdpo.tracking.work import FlopCounter


@dataclass(frozen=True)
class Measurements:
    """Measurements of a run.

    profiler: traces chosen steps. performance: rates, memory and traffic. stragglers: slow ranks and links. health: the
    metrics of the checks before step 0.
    """

    profiler: StepProfiler
    performance: Performance
    stragglers: StragglerWatch
    health: dict[str, float]


def build_measurements(
    recipe: Recipe, policy: Policy, work: FlopCounter, console: Console, health: dict[str, float]
) -> Measurements:
    """Return the measurements of this run; registers callbacks on the policy. Collective.

    work: the learner's record of scored and trained sequences. health: metrics of the health checks.
    """
    context = policy.context
    return Measurements(
        profiler=StepProfiler(recipe.profile, recipe.output / "profile", context.rank, context.device, console),
        performance=build_performance(recipe, policy, work),
        stragglers=StragglerWatch(recipe.health, context, console, policy, health.get("health/allreduce_gb_per_s")),
        health=health,
    )


def build_performance(recipe: Recipe, policy: Policy, work: FlopCounter) -> Performance:
    """Return the performance metrics of this run; registers a callback on the policy for its micro-batches."""
    context = policy.context
    layout = replace(
        layout_of(recipe, context.world_size),
        spec=choose_spec(recipe.model, context.device),
        value_bytes=recipe.model.torch_dtype.itemsize,
        overlap=overlaps(context),
    )
    traffic = TrainingTraffic(policy.architecture, layout, context.groups.pp.rank(), policy.head_chunk)
    policy.on_training = traffic
    rollout = recipe.rollout
    return Performance(
        policy.architecture,
        context,
        work,
        traffic,
        peak_flops_s=device_peak(context.device, recipe.profile.peak_tflops),
        samples_here=rollout.engine == "embedded" or rollout.sglang.placement == "colocated",
        waits=not rollout.ahead,
    )
