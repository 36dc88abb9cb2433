"""Command `python -m megatron_hdpo plan RECIPE`: the recipe's step on a cluster, and faster layouts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_hdpo.config import Recipe, load_recipe
from megatron_hdpo.config.check import length_errors
from megatron_hdpo.costs.cluster import cluster_of
from megatron_hdpo.costs.errors import PlanError
from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.model.fp8_rules import precision_errors
from megatron_hdpo.planner.from_recipe import Guesses, common_of, layout_of, rollouts_of, workload_of
from megatron_hdpo.planner.occasional import occasions
from megatron_hdpo.planner.plan import plan, search
from megatron_hdpo.planner.shapes import architecture_of
from megatron_hdpo.planner.text import describe, ranking


def plan_recipe(recipe_path: Path, overrides: Sequence[str], options: argparse.Namespace) -> str:
    """Return the text of the plan. Raises RecipeError and PlanError."""
    recipe = load_recipe(recipe_path, overrides)
    architecture = architecture_of(options.model or recipe.model.path)
    cluster = cluster_of(options.gpu, options.nodes, options.gpus_per_node)
    _check(recipe, architecture)
    guesses = Guesses(
        cliff_rate=options.cliff_rate,
        solved_rate=options.solved_rate,
        privileged_success=options.privileged_success,
        prompt_tokens=options.prompt_tokens,
        privileged_prompt_tokens=options.privileged_prompt_tokens,
        response_tokens=options.response_tokens,
        rollout_gpus=options.rollout_gpus,
    )
    workload, rollouts = workload_of(recipe, guesses), rollouts_of(recipe, guesses)
    layout = layout_of(recipe, cluster.gpus - rollouts.gpus)
    own = plan(architecture, cluster, layout, workload, rollouts)
    found = search(architecture, cluster, workload, rollouts, common_of(layout))
    lengths = f"mean lengths: prompt {workload.prompt_tokens}, response {workload.response_tokens} tokens; " + (
        f"cliffs {workload.cliff_rate:.0%}, privileged success {workload.privileged_success:.0%}"
    )
    return "\n\n".join([lengths, describe(own), "\n".join(occasions(own, recipe)), ranking(found)])


def _check(recipe: Recipe, architecture: Architecture) -> None:
    """Raise PlanError for what the trainer would refuse, and for what Hopper GPUs (the only known ones) lack."""
    errors = [
        *length_errors(recipe, architecture),
        *precision_errors(recipe.model, recipe.parallel, architecture),
    ]
    if recipe.model.fp8 is not None and recipe.model.fp8_recipe == "mxfp8":
        errors.append("model.fp8_recipe: mxfp8 needs a Blackwell GPU; H100 and H200 do not have it")
    if errors:
        raise PlanError("\n".join(errors))
