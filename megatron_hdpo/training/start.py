"""From a built run to its first step: resume or warm up, set the teacher, sync weights, run the self-test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_hdpo.checkpoint.store import read_state
from megatron_hdpo.config.file import recipe_changes
from megatron_hdpo.config.recipe import Recipe, RecipeError
from megatron_hdpo.health.selftest import SelfTestError, logprob_limit, run_self_test
from megatron_hdpo.sampling.delivery import deliver_to_all
from megatron_hdpo.sampling.failures import most_frequent
from megatron_hdpo.teachers.build import build_teacher
from megatron_hdpo.teachers.config import ExternalTeacherConfig
from megatron_hdpo.teachers.external import check_same_vocabulary
from megatron_hdpo.teachers.weight_copies import FrozenTeacher
from megatron_hdpo.tracking.formats import amount
from megatron_hdpo.tracking.metrics import METRICS_FILE, read_metrics
from megatron_hdpo.training.load_data import check_replay
from megatron_hdpo.training.own_code import changed_code
from megatron_hdpo.training.run import Run
from megatron_hdpo.training.tokenizer import load_tokenizer
from megatron_hdpo.training.warmup import warm_up
from megatron_hdpo.types.errors import DataError
from megatron_hdpo.types.rollouts import Group
from megatron_hdpo.types.secrets import without_passwords
from megatron_hdpo.weights.host import copy_to_host, load_from_host

FROZEN_TEACHER = "teacher"
WARMED_UP = "warmed_up"
DECIDE_ON_DATA = ("data.", "model.", "objective.", "warmup.", "reward.")
"""Beginnings of the recipe's keys that decide which problems are trained on."""


def prepare(run: Run) -> None:
    """Bring the run to the state in which `run.step` is the next step to take."""
    with run.console.phase("prepare"):
        _prepare(run)


def _prepare(run: Run) -> None:
    _check_tokenizers(run)
    latest = run.checkpoints.latest()
    if latest is None:
        _begin(run)
    else:
        _resume(run, latest)
    if run.recipe.rollout.replay is None:
        with run.console.phase("sync"):
            run.sync(run.step)
        if run.recipe.self_test.enabled:
            _self_test(run)
            if run.recipe.rollout.takes_turns:
                with run.console.phase("sync"):
                    run.sync(run.step)


def _begin(run: Run) -> None:
    check_replay(run.recipe, run.step)
    _warn_of_earlier_metrics(run)
    run.record.open(None)
    if run.recipe.warmup.kind == "sft":
        _warm_up_once(run)
    _build_optimizer(run)
    if _keeps_start(run):
        run.checkpoints.save_weights(FROZEN_TEACHER, run.policy.model)
    _set_teachers(run)


def _warn_of_earlier_metrics(run: Run) -> None:
    """Warn when the folder's metrics are of a run that had come further: nobody may take this one for its rest."""
    output = run.recipe.output
    if not run.context.is_leader or not (output / METRICS_FILE).is_file():
        return
    if last := max((line["step"] for line in read_metrics(output)), default=0):
        run.console.warn(
            f"{output} has metrics up to step {last} but no checkpoint: the run begins anew, and they are set aside"
        )


def _resume(run: Run, latest: Path) -> None:
    """Resume from a checkpoint; the run folder is not changed before the checkpoint is known to fit the recipe."""
    _build_optimizer(run)
    changes = recipe_changes(run.recipe.output / "recipe.yaml", run.recipe)
    _check_code(run, latest)
    _check_data(run, latest, changes)
    with run.console.phase("resume"):
        run.step = run.saved_step = run.checkpoints.load(latest, run.policy).step
        _restore_teachers(run)
        run.learner.load_state_dict(run.checkpoints.load_learner_state(latest))
    check_replay(run.recipe, run.step)
    if changes:
        run.console.warn("the recipe has changed since this run was last started: " + "; ".join(changes))
    run.record.open(run.step)
    run.console.print(f"resumed from {latest.name}")


def _check_data(run: Run, latest: Path, changes: Sequence[str]) -> None:
    """Raise DataError when the problems are others than those of the run, and no change of the recipe explains it."""
    then, now = read_state(latest).data, run.checkpoints.data
    if then in ("", now) or any(change.startswith(DECIDE_ON_DATA) for change in changes):
        return
    difference = f"{then.partition(',')[0]} before, {now.partition(',')[0]} now, and their texts or their order differ"
    if not run.accept_changes:
        raise DataError(
            f"data.train: the run in {run.recipe.output} was trained on other problems ({difference}): restore them, "
            "train into another output folder, or go on with these by --accept-changes"
        )
    run.console.warn(f"data.train: the run goes on with other problems ({difference})")


def _check_code(run: Run, latest: Path) -> None:
    """Raise RecipeError when a file of the user's own is not what it was; what a recipe adds or drops is no change."""
    changed = changed_code(read_state(latest).code, run.checkpoints.code)
    if not changed:
        return
    named = ", ".join(changed)
    if not run.accept_changes:
        raise RecipeError(
            f"{named}: the code has changed since the run in {run.recipe.output} was last started; its copy is in "
            f"{run.recipe.output / 'code'}: restore it, train into another output folder, or go on with the new code "
            "by --accept-changes"
        )
    run.console.warn(f"{named}: the run goes on with changed code")


def _build_optimizer(run: Run) -> None:
    run.rebuild_optimizer(run.recipe.optimizer, run.recipe.train.steps * run.recipe.train.updates_per_step)


def _warm_up_once(run: Run) -> None:
    """Warm up, or load the weights of an earlier warm-up of the same recipe."""
    recipe = run.recipe
    origin = without_passwords(
        "\n".join(
            [
                recipe.warmup.model_dump_json(),
                recipe.model.model_dump_json(),
                recipe.data.model_dump_json(exclude={"evaluation"}),
                str(recipe.seed),
            ]
        )
    )
    if run.checkpoints.has_weights(WARMED_UP, origin):
        run.checkpoints.load_weights(WARMED_UP, run.policy.model)
    else:
        warm_up(run, recipe.warmup)
        run.checkpoints.save_weights(WARMED_UP, run.policy.model, origin)


def _keeps_start(run: Run) -> bool:
    """Return whether the model before RL training is needed: as a frozen teacher or as the reference."""
    return run.recipe.teacher.kind == "frozen" or run.recipe.objective.needs_reference


def _set_teachers(run: Run, start: FrozenTeacher | None = None) -> None:
    """Set teacher and reference. start: the model before RL training; default: the current model."""
    recipe = run.recipe
    if _keeps_start(run):
        start = start or FrozenTeacher(run.policy)
    if recipe.objective.needs_reference:
        run.learner.reference = start
    frozen = start if recipe.teacher.kind == "frozen" else None
    run.learner.teacher = frozen or build_teacher(recipe.teacher, run.policy, recipe.model)


def _restore_teachers(run: Run) -> None:
    """Set teacher and reference from the saved weights of the model before RL training."""
    start = None
    if _keeps_start(run):
        policy = copy_to_host(run.policy.model)
        run.checkpoints.load_weights(FROZEN_TEACHER, run.policy.model)
        start = FrozenTeacher(run.policy)
        load_from_host(run.policy.model, policy)
    _set_teachers(run, start)


def _check_tokenizers(run: Run) -> None:
    teacher = run.recipe.teacher
    if isinstance(teacher, ExternalTeacherConfig):
        there, here = load_tokenizer(teacher.path, "teacher.path"), load_tokenizer(run.recipe.model.path)
        check_same_vocabulary(there.get_vocab(), here.get_vocab(), teacher.path)


def fp8_key(recipe: Recipe) -> str | None:
    """Return the setting that makes trainer or engine round the products of layers to FP8; None without such a one."""
    model, sglang = recipe.model, recipe.rollout.sglang
    if model.fp8 is not None:
        return f"model.fp8={model.fp8}"
    if model.fp8_emulation is not None:
        return f"model.fp8_emulation={model.fp8_emulation}"
    if recipe.rollout.engine == "sglang" and sglang.placement != "given" and sglang.servers.quantization is not None:
        return f"rollout.sglang.servers.quantization={sglang.servers.quantization}"
    return None


def _self_test(run: Run) -> None:
    config, recipe = run.recipe.self_test, run.recipe
    problems = run.data.order.batch(0, min(config.prompts, len(run.data.train)))
    sampling = recipe.rollout.model_copy(update={"max_new_tokens": config.max_new_tokens}).sampling(
        1, run.coordinator.stop_token_ids
    )

    def sample() -> list[Group]:
        groups = deliver_to_all(run.coordinator.groups(problems, sampling, ("self-test",)), run.context)
        run.engine.make_room()  # the policy scores them
        failures = run.context.gather_objects(run.coordinator.sampler.failures.take())
        if any(failures) and not any(group.samples for group in groups):
            raise SelfTestError(
                f"self-test: none of {amount(len(groups), 'rollout')} could be used: {most_frequent(failures)}"
            )
        return groups

    def sync(scale: float) -> None:
        run.sync(run.step, scale)

    exact = recipe.model.dtype == "float32" and recipe.rollout.engine_dtype == "float32"
    limit = logprob_limit(config, exact, fp8_key(recipe))
    with run.console.phase("self-test"):
        result = run_self_test(
            config=config,
            policy=run.policy,
            sample=sample,
            sync=sync,
            version=run.step,
            limit=limit,
            temperature=recipe.rollout.temperature,
        )
    run.console.print(
        f"self-test passed: log-probs of engine and trainer differ by {result.mean_difference:.2g} nats on average "
        f"({limit}), {result.max_difference:.2g} at worst, over {amount(result.tokens, 'token')}; divergence from an "
        f"identical teacher {result.divergence:.2g} (should be near 0); weight sync verified"
    )
