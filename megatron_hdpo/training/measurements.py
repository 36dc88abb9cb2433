"""Performance measurements of a run, built from its recipe."""

from __future__ import annotations

from dataclasses import replace

from megatron_hdpo.config import Recipe
from megatron_hdpo.model.config import choose_spec
from megatron_hdpo.model.overlap import overlaps
from megatron_hdpo.model.policy import Policy
from megatron_hdpo.planner.from_recipe import layout_of
from megatron_hdpo.tracking.communication import TrainingTraffic
from megatron_hdpo.tracking.performance import Performance, device_peak
from megatron_hdpo.tracking.work import StepWork


def build_performance(recipe: Recipe, policy: Policy, work: StepWork) -> Performance:
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
