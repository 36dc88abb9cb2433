"""What to rehearse, as planner and program see it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_hdpo.config import Recipe, load_recipe
from megatron_hdpo.costs.layout import Layout
from megatron_hdpo.costs.workload import RolloutSetup, Workload
from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.planner.from_recipe import Guesses, layout_of, rollouts_of, workload_of
from megatron_hdpo.planner.shapes import architecture_of


@dataclass(frozen=True)
class Asked:
    """What to rehearse. guesses: fields of the planner's Guesses. micro_batches: of training per update; None: all."""

    recipe: str
    overrides: Sequence[str]
    gpu: str
    world: int
    model: str | None = None
    micro_batches: int | None = None
    guesses: dict[str, Any] | None = None


@dataclass(frozen=True)
class Setting:
    """A recipe as planner and program see it."""

    recipe: Recipe
    architecture: Architecture
    layout: Layout
    workload: Workload
    rollouts: RolloutSetup


def setting_of(asked: Asked) -> Setting:
    """Return the setting of a rehearsal. Raises RecipeError, PlanError or LayoutError."""
    recipe = load_recipe(asked.recipe, asked.overrides, snapshots=False)
    architecture = architecture_of(asked.model or recipe.model.path)
    guesses = Guesses(**({"rollout_gpus": _server_gpus(recipe)} | (asked.guesses or {})))
    layout = layout_of(recipe, asked.world)
    workload = workload_of(recipe, guesses)
    if asked.micro_batches is not None:
        workload = shortened(workload, layout, asked.micro_batches)
    return Setting(recipe, architecture, layout, workload, rollouts_of(recipe, guesses))


def _server_gpus(recipe: Recipe) -> int:
    """Return GPUs for servers apart from the trainer's; how many there are changes nothing on a trainer's rank."""
    apart = recipe.rollout.engine == "sglang" and recipe.rollout.sglang.placement != "colocated"
    return recipe.rollout.sglang.servers.tensor_parallel if apart else 0


def shortened(workload: Workload, layout: Layout, micro_batches: int) -> Workload:
    """Return the workload with as few prompts as give every replica `micro_batches` micro-batches of training."""
    per_batch = max(1, workload.micro_batch_tokens // workload.sequence_tokens)
    per_prompt = workload.trained_sequences / workload.prompts
    groups = max(1, math.ceil(micro_batches * per_batch * workload.updates / max(per_prompt, 1e-9)))
    return replace(workload, prompts=min(workload.prompts, groups * layout.data))


def sampled_ranks(layout: Layout) -> list[int]:
    """Return a rank of each kind: of the first, a middle and the last stage, of the first and last owner of experts."""
    stage_ranks = layout.world // layout.pipeline
    owners = sorted({0, layout.expert - 1})
    return [stage * stage_ranks + owner * layout.expert_tensor for stage in layout.stages for owner in owners]
