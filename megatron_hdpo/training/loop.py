"""Training loop: sample, learn, sync, evaluate and save."""

from __future__ import annotations

from megatron_hdpo.evaluation.evaluate import evaluate
from megatron_hdpo.tracking.names import STEP_SECONDS
from megatron_hdpo.tracking.performance import over_longer_step
from megatron_hdpo.training.mismatch import check_mismatch
from megatron_hdpo.training.rollout_phase import begin_next_rollouts, collect_step_rollouts, flush_saved_rollouts
from megatron_hdpo.training.run import Run
from megatron_hdpo.training.start import prepare
from megatron_hdpo.weights.save import save_hf


def train(run: Run) -> None:
    """Train to the recipe's last step, from the state of the run folder. Collective over all ranks."""
    prepare(run)
    recipe, last = run.recipe, run.recipe.train.steps
    if run.step >= last > 0:
        run.console.print(
            f"nothing left to train: {recipe.output} is at step {run.step} of {last}; raise train.steps to go on, "
            "or use another output folder"
        )
    _record_start(run)
    while run.step < last:
        run.measurements.performance.begin()
        with run.measurements.profiler.step(run.step + 1):
            metrics = _step(run)
        _record_and_save(run, metrics)
    if recipe.checkpoint.export:
        with run.console.phase("export"):
            run.engine.make_room()  # the weights may be in host memory
            out = recipe.output / "hf"
            save_hf(run.policy.model, run.architecture, run.context, recipe.model.path, out, overwrite=True)


def _record_start(run: Run) -> None:
    """Log step 0 of a fresh run.

    Startup time is logged in step 0 or not at all; it never counts towards step 1.
    """
    before = run.step == 0 and run.recipe.evaluation.before
    metrics = run.measurements.health | (evaluate_now(run) if before else {})
    times = run.console.timer.metrics()
    if run.step == 0 and (run.measurements.health or before):
        run.record.log(0, metrics | times)
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
    if recipe.rollout.replay is None:
        metrics |= sync(run)
    if due(run.step, recipe.evaluation.every, recipe.train.steps):
        metrics |= evaluate_now(run)
    return metrics


def sync(run: Run) -> dict[str, float]:
    """Send the new weights to the engine and return the sync metrics.

    With `rollout.swap: after_batch`, wait for the samples in progress first.
    """
    if run.recipe.rollout.ahead and run.recipe.rollout.swap == "after_batch":
        with run.console.phase("rollouts ahead"):
            run.prefetched.wait()
    with run.console.phase("sync"):
        return run.sync(run.step)


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
    if due(run.step, run.recipe.checkpoint.every, run.recipe.train.steps):
        with run.console.phase("save"):
            flush_saved_rollouts(run)  # a resume does not sample these steps again
            run.checkpoints.save(run.step, run.policy, run.learner.state_dict())
        saving = run.console.timer.metrics()
        seconds = metrics[STEP_SECONDS] + saving[STEP_SECONDS]
        run.record.log(run.step, saving | {STEP_SECONDS: seconds} | over_longer_step(metrics, seconds))


def due(step: int, every: int | None, last: int) -> bool:
    """Return whether a periodic action is due after this step; it is always due after the last one."""
    return step == last or (every is not None and step % every == 0)


def evaluate_now(run: Run) -> dict[str, float]:
    """Return evaluation metrics of the engine's weights; {} without evaluation problems or without an engine."""
    config, problems = run.recipe.evaluation, run.data.evaluation
    if not problems or run.recipe.rollout.replay is not None:
        return {}
    run.prefetched.wait()  # only one thread at a time may read an engine's results
    with run.console.phase("evaluate", total=0, unit="sample") as phase:
        phase.note(run.whose_samples)
        return evaluate(config, problems, run.coordinator, phase)
