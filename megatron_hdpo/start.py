"""From a built run to its first step: resume or warm up, set the teacher, fill the engine, test everything once."""

from __future__ import annotations

from megatron_hdpo.rollout.types import Group
from megatron_hdpo.run import Run, scaled_final_norm
from megatron_hdpo.selftest import run_self_test
from megatron_hdpo.teachers.teacher import FrozenTeacher
from megatron_hdpo.warmup import warm_up
from megatron_hdpo.weights.stream import stream_hf

FROZEN_TEACHER = "teacher"
WARMED_UP = "warmed_up"


def prepare(run: Run) -> None:
    """Bring the run to the state in which `run.step` is the next step to take."""
    latest = run.checkpoints.latest()
    if latest is None and run.recipe.warmup.kind == "sft":
        _warm_up_once(run)
    run.rebuild_optimizer(run.recipe.optimizer, run.recipe.train.steps * run.recipe.train.updates_per_step)
    _set_teacher(run, fresh=latest is None)
    if latest is not None:
        with run.console.phase("resume"):
            run.step = run.checkpoints.load(latest, run.policy).step
        run.console.print(f"resumed from {latest.name}")
    if run.recipe.rollout.replay is None:
        with run.console.phase("sync"):
            run.sync(run.step)
        if run.recipe.self_test.enabled:
            _self_test(run)


def _warm_up_once(run: Run) -> None:
    """A run that was stopped before its first checkpoint does not warm up again."""
    if run.checkpoints.has_weights(WARMED_UP):
        run.checkpoints.load_weights(WARMED_UP, run.policy.model)
    else:
        warm_up(run, run.recipe.warmup)
        run.checkpoints.save_weights(WARMED_UP, run.policy.model)


def _set_teacher(run: Run, fresh: bool) -> None:
    """The frozen teacher is the model as reinforcement learning found it; a resumed run reads it back."""
    if run.recipe.teacher.kind != "frozen":
        return
    if fresh:
        run.checkpoints.save_weights(FROZEN_TEACHER, run.policy.model)
    else:
        run.checkpoints.load_weights(FROZEN_TEACHER, run.policy.model)
    run.set_teacher(FrozenTeacher(run.policy.model))


def _self_test(run: Run) -> None:
    config, recipe = run.recipe.self_test, run.recipe
    problems = run.data.order.batch(0, min(config.prompts, len(run.data.train)))
    sampling = recipe.rollout.model_copy(update={"max_new_tokens": config.max_new_tokens}).sampling(
        1, run.rollouts.stop_token_ids
    )

    def sample() -> list[Group]:
        return run.rollouts.groups(problems, sampling, ("self-test",))

    def sync(scale: float) -> None:
        stream = stream_hf(run.policy.model, run.architecture, run.context)
        run.engine.update_weights(scaled_final_norm(stream, scale), run.step)

    exact = recipe.model.dtype == "float32" and recipe.rollout.embedded.dtype == "float32"
    with run.console.phase("self-test"):
        result = run_self_test(config, run.policy, sample, sync, run.step, exact, recipe.rollout.temperature)
    run.console.print(
        f"self-test passed: engine and trainer differ by {result.mean_difference:.2g} nats per token on average, "
        f"{result.max_difference:.2g} at most, over {result.tokens} tokens; divergence of an equal teacher "
        f"{result.divergence:.2g}; weight updates arrive"
    )
