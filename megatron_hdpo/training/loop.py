"""The training loop: sample, learn, sync; evaluate and save."""

from __future__ import annotations

from megatron_hdpo.evaluation.evaluate import evaluate, evaluation_samples
from megatron_hdpo.tracking.names import STEP_SECONDS
from megatron_hdpo.tracking.performance import over_longer_step
from megatron_hdpo.training.rollout_phase import begin_next_rollouts, rollouts_of_step, share_of
from megatron_hdpo.training.run import Run
from megatron_hdpo.training.start import prepare
from megatron_hdpo.weights.save import save_hf


def train(run: Run) -> None:
    """Train to the recipe's last step, from wherever the run folder stands. Collective over all ranks."""
    prepare(run)
    recipe, last = run.recipe, run.recipe.train.steps
    if run.step >= last > 0:
        run.console.print(
            f"nothing left to train: {recipe.output} is at step {run.step} of {last}; raise train.steps to go on, or "
            "name another output folder"
        )
    _record_start(run)
    while run.step < last:
        run.performance.begin()
        with run.profiler.step(run.step + 1):
            metrics = _step(run)
        _record_and_save(run, metrics)
    if recipe.checkpoint.export:
        with run.console.phase("export"):
            out = recipe.output / "hf"
            save_hf(run.policy.model, run.architecture, run.context, recipe.model.path, out, overwrite=True)


def _record_start(run: Run) -> None:
    """A line for step 0 of a fresh run. What starting took is in it, or nowhere: it is no part of the first step."""
    before = run.step == 0 and run.recipe.evaluation.before
    metrics = run.health | (evaluate_now(run) if before else {})
    times = run.console.timer.metrics()
    if run.step == 0 and (run.health or before):
        run.tracker.log(0, metrics | times)
    if passed := [step for step in run.recipe.profile.steps if step <= run.step]:
        run.console.warn(f"profile.steps: {passed} are done already, and are not traced")


def _step(run: Run) -> dict[str, float]:
    recipe = run.recipe
    groups, metrics = rollouts_of_step(run)
    begin_next_rollouts(run)
    metrics |= run.learner.learn(groups, run.step)
    run.step += 1
    metrics |= run.stragglers.metrics(run.step)
    if recipe.rollout.replay is None:
        metrics |= sync(run)
    if due(run.step, recipe.evaluation.every, recipe.train.steps):
        metrics |= evaluate_now(run)
    return metrics


def sync(run: Run) -> dict[str, float]:
    """Give the engine the new weights; metrics. Samples in progress are waited for where the recipe says so."""
    if run.recipe.rollout.ahead and run.recipe.rollout.swap == "after_batch":
        with run.console.phase("rollouts ahead"):
            run.step_rollouts.wait()
    with run.console.phase("sync"):
        return run.sync(run.step)


def _record_and_save(run: Run, metrics: dict[str, float]) -> None:
    """The step's line first, then its checkpoint: a run killed in between repeats the step and replaces the line; the
    other way round the line would be missing for ever. What saving took is merged into the line afterwards.
    """
    metrics |= run.console.timer.metrics()
    metrics |= run.performance.metrics(metrics)
    run.console.step(run.step, run.recipe.train.steps, metrics)
    run.tracker.log(run.step, metrics)
    if due(run.step, run.recipe.checkpoint.every, run.recipe.train.steps):
        with run.console.phase("save"):
            run.checkpoints.save(run.step, run.policy, run.learner.memory())
        saving = run.console.timer.metrics()
        seconds = metrics[STEP_SECONDS] + saving[STEP_SECONDS]
        run.tracker.log(run.step, saving | {STEP_SECONDS: seconds} | over_longer_step(metrics, seconds))


def due(step: int, every: int | None, last: int) -> bool:
    """Whether something that happens every so many steps, and at the last one, happens after this step."""
    return step == last or (every is not None and step % every == 0)


def evaluate_now(run: Run) -> dict[str, float]:
    """Evaluation metrics of the weights that the engine holds; {} without evaluation problems or an engine."""
    config, problems = run.recipe.evaluation, run.data.evaluation
    if not problems or run.recipe.rollout.replay is not None:
        return {}
    run.step_rollouts.wait()  # an engine's results go to one reader at a time
    total = share_of(run, evaluation_samples(config, problems))
    with run.console.phase("evaluate", total=total, unit="sample") as phase:
        return evaluate(config, problems, run.rollouts, phase.advance)
