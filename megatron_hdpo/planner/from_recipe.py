"""Inputs of the planner, read from a recipe."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_hdpo.config import Recipe
from megatron_hdpo.costs.errors import PlanError
from megatron_hdpo.costs.layout import Layout, Spec
from megatron_hdpo.costs.workload import RolloutSetup, Workload
from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.planner.asked_work import Steps, work_of
from megatron_hdpo.planner.shapes import architecture_of
from megatron_hdpo.teachers.config import ExternalTeacherConfig

# A recipe has the limits of prompts and responses, not their mean lengths. Assumed means, as shares of the limits.
MEAN_PROMPT_SHARE = 0.25
MEAN_RESPONSE_SHARE = 0.5


@dataclass(frozen=True)
class Guesses:
    """Assumptions that are not in a recipe. Lengths are means in tokens; None takes the shares above."""

    cliff_rate: float = 0.25
    solved_rate: float = 0.0
    privileged_success: float = 0.5
    prompt_tokens: int | None = None
    privileged_prompt_tokens: int | None = None
    response_tokens: int | None = None
    rollout_gpus: int = 0


def workload_of(recipe: Recipe, guesses: Guesses) -> Workload:
    """Return the work of a step. Raises PlanError for what is not planned."""
    objective, prompts, rollout = recipe.objective, recipe.data.prompts, recipe.rollout
    if recipe.model.dtype == "float32":  # auto is bfloat16 on GPUs
        raise PlanError("model.dtype=float32 is not planned: GPUs train in bfloat16")
    prompt = _mean(guesses.prompt_tokens, prompts.max_prompt_tokens, MEAN_PROMPT_SHARE)
    privileged = _mean(guesses.privileged_prompt_tokens, prompts.privileged_limit, MEAN_PROMPT_SHARE)
    updates = recipe.train.updates_per_step
    work = Workload(
        prompts=rollout.prompts_per_step,
        samples=rollout.samples_per_prompt,
        prompt_tokens=prompt,
        response_tokens=_mean(guesses.response_tokens, rollout.max_new_tokens, MEAN_RESPONSE_SHARE),
        longest_response=rollout.max_new_tokens,
        privileged_prompt_tokens=privileged,
        privileged_success=guesses.privileged_success,
        cliff_rate=guesses.cliff_rate,
        solved_rate=guesses.solved_rate,
        micro_batch_tokens=recipe.train.micro_batch_tokens,
        head_chunk=recipe.train.head_chunk,
        updates=updates,
        teacher=recipe.teacher.kind if objective.teachers else "none",
        teacher_model=_teacher_model(recipe),
        top_k=0,
    )
    steps = Steps(
        count=recipe.train.steps,
        updates=updates,
        samples=rollout.samples_per_prompt,
        prompt=prompt,
        privileged=privileged,
        cliff_rate=guesses.cliff_rate,
        solved_rate=guesses.solved_rate,
    )
    return replace(work, **work_of(objective, steps))


def _mean(given: int | None, longest: int, share: float) -> int:
    return given if given is not None else max(1, round(longest * share))


def _teacher_model(recipe: Recipe) -> Architecture | None:
    """Return the architecture of an external teacher, or None.

    Raises PlanError if its path is neither a folder nor a known shape.
    """
    return architecture_of(recipe.teacher.path) if isinstance(recipe.teacher, ExternalTeacherConfig) else None


def rollouts_of(recipe: Recipe, guesses: Guesses) -> RolloutSetup:
    """Return the engine that samples the recipe's rollouts."""
    rollout = recipe.rollout
    if rollout.engine == "embedded":
        return RolloutSetup("embedded", max_concurrency=rollout.embedded.max_batch_sequences)
    servers = rollout.sglang.servers
    return RolloutSetup(
        engine="colocated" if rollout.sglang.placement == "colocated" else "separate",
        tensor=servers.tensor_parallel,
        gpus=guesses.rollout_gpus,
        max_concurrency=rollout.sglang.max_concurrency,
        saver=servers.memory_saver,
        memory_fraction=servers.mem_fraction_static,
        ahead=rollout.ahead > 0,
        fp8=servers.quantization == "fp8",
        trainer_memory=rollout.sglang.trainer_memory,
    )


def layout_of(recipe: Recipe, gpus: int) -> Layout:
    """Return the recipe's layout over `gpus` GPUs. Raises PlanError if they are not a multiple of the model's ranks."""
    parallel, model = recipe.parallel, recipe.model
    ranks = parallel.model_ranks
    if gpus % ranks:
        raise PlanError(
            f"{gpus} GPUs are not a multiple of parallel.tensor x parallel.context x parallel.pipeline = {ranks}"
        )
    spec: Spec = "torch" if model.spec == "torch" else "transformer_engine"
    replicas = gpus // ranks
    return Layout(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        data=replicas,
        sequence=parallel.sequence,
        recompute=model.recompute == "full",
        spec=spec,
        context=parallel.context,
        expert=parallel.expert,
        expert_tensor=parallel.expert_tensor,
        virtual_stages=parallel.virtual_stages,
        recomputed=tuple(model.recompute_modules) if model.recompute == "selective" else (),
        fp8=model.fp8 is not None,
        overlap=replicas * parallel.context > 1 if parallel.overlap == "auto" else parallel.overlap,
        offload=recipe.optimizer.offload,
    )


def common_of(layout: Layout) -> Layout:
    """Return the settings that a search does not vary: the modules, their precision, overlap and offload."""
    return Layout(spec=layout.spec, fp8=layout.fp8, overlap=layout.overlap, offload=layout.offload)
