"""Training loop: sample, learn, sync, evaluate and save.

A request to end the run (a signal on any rank) takes effect between two of these. A step whose rollouts are being
sampled is dropped; one that has begun to learn is finished and saved, without sync and evaluation. The next start makes
up for both.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from functools import partial

from megatron_hdpo.checkpoint.store import NoRoomError
from megatron_hdpo.evaluation.evaluate import Responses, evaluate, remarks
from megatron_hdpo.parallel.stop_request import StopRequested
from megatron_hdpo.sampling.failures import most_frequent
from megatron_hdpo.tracking.names import STEP_SECONDS
from megatron_hdpo.tracking.performance import over_longer_step
from megatron_hdpo.training.mismatch import check_mismatch
from megatron_hdpo.training.rollout_phase import begin_next_rollouts, collect_step_rollouts, flush_saved_rollouts
from megatron_hdpo.training.run import Run
from megatron_hdpo.training.start import prepare
from megatron_hdpo.weights.save import save_hf


def train(run: Run) -> bool:
    """Train to the recipe's last step, from the state of the run folder. Collective over all ranks.

    Returns whether it came so far; False when the run was asked to end, and has saved what it had.
    """
    prepare(run)
    with run.stop_request.accepted(run.console.print):
        try:
            _train_to_last_step(run)
        except StopRequested:
            _stop(run)
            return False
    recipe = run.recipe
    if recipe.checkpoint.export:
        with run.console.phase("export"):
            run.engine.make_room()  # the weights may be in host memory
            out = recipe.output / "hf"
            save_hf(run.policy.model, run.architecture, run.context, recipe.model.path, out, overwrite=True)
    return True


def _train_to_last_step(run: Run) -> None:
    """Take all the steps that are left. Raises StopRequested, on all ranks, when the run is to end before that."""
    recipe, last = run.recipe, run.recipe.train.steps
    if run.step >= last > 0:
        run.console.print(
            f"nothing left to train: {recipe.output} is at step {run.step} of {last}; raise train.steps to go on, "
            "or use another output folder"
        )
    _record_start(run)
    while run.step < last:
        run.measurements.performance.begin()
        run.console.begin_step(run.step + 1)
        with run.measurements.profiler.step(run.step + 1):
            metrics = _step(run)
        _record_and_save(run, metrics)
        if _is_asked_to_stop(run):
            raise StopRequested


def _is_asked_to_stop(run: Run) -> bool:
    """Return whether any rank was asked to end the run. Collective."""
    return any(run.context.gather_objects(bool(run.stop_request)))


def _stop(run: Run) -> None:
    """Save what was trained since the last checkpoint, and say how to go on. Collective."""
    if run.step > run.saved_step:
        with run.console.phase("save"):
            _save(run)
    state = f"step {run.step} of {run.recipe.train.steps} is saved" if run.step else "no step was trained yet"
    run.console.print(f"ended as asked: {state}; run the same command again to go on")


def _record_start(run: Run) -> None:
    """Log step 0 of a fresh run; of a resumed one, the evaluation that its last step was stopped before.

    Startup time is logged in step 0 or not at all; it never counts towards step 1.
    """
    recipe = run.recipe
    before = run.step == 0 and recipe.evaluation.before
    missing = run.step > 0 and due(run.step, recipe.evaluation.every, recipe.train.steps) and not _was_evaluated(run)
    evaluation = evaluate_now(run) if before or missing else {}
    metrics = run.measurements.health | evaluation
    times = run.console.timer.metrics()
    if run.step == 0 and (run.measurements.health or before):
        run.record.log(0, metrics | times)
    elif evaluation:
        run.record.log(run.step, evaluation)
    run.console.evaluation(run.step, run.record.evaluated(run.step, metrics))
    if passed := [step for step in run.recipe.profile.steps if step <= run.step]:
        run.console.warn(f"profile.steps: {passed} are done already, so they are not traced")


def _step(run: Run) -> dict[str, float]:
    recipe = run.recipe
    rollouts, metrics = collect_step_rollouts(run)
    begin_next_rollouts(run)
    metrics |= run.learner.learn(rollouts, run.step)
    run.step += 1
    if recipe.rollout.replay is None:  # those that are replayed are of another run's weights
        check_mismatch(metrics, recipe.train.max_mismatch_k3, run.step)
    metrics |= run.measurements.stragglers.metrics(run.step)
    if _is_asked_to_stop(run):
        return metrics  # servers may have had the same signal
    if recipe.rollout.replay is None:
        metrics |= _sync_and_evaluate(run)
    return metrics


def _was_evaluated(run: Run) -> bool:
    """Return whether the record of the run's last step has an evaluation. Collective."""
    return run.context.broadcast_object(run.record.has_evaluation(run.step))


def _sync_and_evaluate(run: Run) -> dict[str, float]:
    """Send the new weights to the engine, evaluate them if that is due, and return the metrics of both.

    With `rollout.swap: after_batch`, the step that is being sampled is completed first, and no other begins meanwhile.
    """
    recipe = run.recipe
    with ExitStack() as stack:
        if recipe.rollout.ahead and recipe.rollout.swap == "after_batch":
            with run.console.phase("rollouts ahead"):
                stack.enter_context(run.prefetched.paused())
        with run.console.phase("sync"):
            metrics = run.sync(run.step)
        if due(run.step, recipe.evaluation.every, recipe.train.steps):
            with suppress(StopRequested):
                metrics |= evaluate_now(run)
    return metrics


def _record_and_save(run: Run, metrics: dict[str, float]) -> None:
    """Log the step, save its checkpoint, and merge the seconds of saving into the step's line.

    In this order a run killed in between repeats the step and replaces the line; in the other order the line would be
    missing for ever.
    """
    metrics |= run.console.timer.metrics()
    metrics |= run.measurements.performance.metrics(metrics)
    run.console.step(run.step, run.recipe.train.steps, metrics, run.objective.headlines)
    run.console.evaluation(run.step, run.record.evaluated(run.step, metrics))
    run.record.log(run.step, metrics)
    if _is_save_due(run):
        with run.console.phase("save"):
            _save_if_there_is_room(run)
        saving = run.console.timer.metrics()
        seconds = metrics[STEP_SECONDS] + saving[STEP_SECONDS]
        run.record.log(run.step, saving | {STEP_SECONDS: seconds} | over_longer_step(metrics, seconds))


def _is_save_due(run: Run) -> bool:
    """Return whether a checkpoint is due after this step, or was due after an earlier one that could not be saved."""
    every = run.recipe.checkpoint.every
    return due(run.step, every, run.recipe.train.steps) or (run.step - 1) // every * every > run.saved_step


def _save_if_there_is_room(run: Run) -> None:
    """Save a checkpoint; warn when the disk cannot take it and later steps may try again."""
    try:
        _save(run)
    except NoRoomError as error:
        if run.step == run.recipe.train.steps:
            raise
        run.console.warn(f"{error}; the next step tries again (last checkpoint: step {run.saved_step})")


def _save(run: Run) -> None:
    flush_saved_rollouts(run)  # a resume does not sample these steps again
    run.checkpoints.save(run.step, run.policy, run.learner.state_dict())
    run.saved_step = run.step


def due(step: int, every: int | None, last: int) -> bool:
    """Return whether a periodic action is due after this step; it is always due after the last one."""
    return step == last or (every is not None and step % every == 0)


def evaluate_now(run: Run) -> dict[str, float]:
    """Return evaluation metrics of the engine's weights; {} without evaluation problems or without an engine."""
    config, problems = run.recipe.evaluation, run.data.evaluation
    if not problems or run.recipe.rollout.replay is not None:
        return {}
    with run.prefetched.paused(), run.console.phase("evaluate", total=0, unit="sample") as phase:
        phase.note(run.whose_samples)
        return evaluate(config, problems, run.coordinator, phase, partial(_say_what_is_missing, run))


def _say_what_is_missing(run: Run, responses: Responses) -> None:
    """Warn of samples of an evaluation that failed. Collective."""
    cause = "see the logs of the ranks"
    if not run.recipe.rollout.ahead:  # else errors of steps that are sampled ahead are among them
        cause = most_frequent(run.context.gather_objects(run.coordinator.sampler.failures.take()))
    for line in remarks(run.recipe.evaluation, responses, cause):
        run.console.warn(line)
