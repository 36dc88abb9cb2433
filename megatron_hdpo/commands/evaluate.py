"""`megatron_hdpo evaluate`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hdpo.commands.base import Command, add_recipe
from megatron_hdpo.commands.opened_run import opened_run

if TYPE_CHECKING:
    from megatron_hdpo.config import Recipe

_DESCRIPTION = """\
Samples responses to data.evaluation, prints pass@k of each set with its 95 %
interval, and writes evaluation.json and evaluation_samples.jsonl (one line per
problem, with the text and reward of each response) into the output folder.
Does not touch the checkpoints and metrics of a run there."""


def _add(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder of the files (default: output of RECIPE)")


def _evaluate(arguments: argparse.Namespace) -> None:
    from megatron_hdpo.config import RecipeError

    with opened_run(arguments.recipe, arguments.overrides) as run:
        # Here: `opened_run` says first what takes seconds to import.
        from megatron_hdpo.evaluation.evaluate import metrics_of, remarks, sample_responses
        from megatron_hdpo.evaluation.files import evaluation_table, write_evaluation
        from megatron_hdpo.sampling.delivery import deliver_to_leader
        from megatron_hdpo.sampling.failures import most_frequent

        config, problems = run.recipe.evaluation, run.data.evaluation
        if run.recipe.rollout.replay is not None:
            raise RecipeError("rollout.replay: an evaluation samples, so it needs an engine: leave replay out")
        if not problems:
            raise RecipeError("data.evaluation: there is no problem to evaluate on: name a task")
        with run.console.phase("sync"):
            run.sync(0)
        with run.console.phase("evaluate", total=0, unit="sample") as phase:
            responses = sample_responses(config, problems, run.coordinator, phase)
        cause = most_frequent(run.context.gather_objects(run.coordinator.sampler.failures.take()))
        for line in remarks(config, responses, cause):
            run.console.warn(line)
        metrics = metrics_of(config, responses)
        run.console.table("Evaluation", evaluation_table(metrics, responses))
        sampled, greedy = (deliver_to_leader(part, run.context) for part in (responses.sampled, responses.greedy))
        if run.context.is_leader:
            folder = arguments.out or run.recipe.output
            write_evaluation(folder, _setting(run.recipe), metrics, sampled, greedy)
            run.console.print(f"written: {folder}/evaluation.json and evaluation_samples.jsonl")


def _setting(recipe: Recipe) -> dict[str, Any]:
    """Return what the numbers of an evaluation depend on, for its file."""
    from megatron_hdpo.config.secrets import redacted

    setting = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "model": str(recipe.model.path),
        "dtype": recipe.rollout.engine_dtype,
        "seed": recipe.seed,
        "evaluation": recipe.evaluation.model_dump(mode="json"),
        "data": [task.model_dump(mode="json") for task in recipe.data.evaluation],
    }
    return redacted(setting)


COMMAND = Command(
    "evaluate",
    "Evaluate a model on the held-out problems of a recipe.",
    _add,
    _evaluate,
    description=_DESCRIPTION,
    examples=("my.yaml", "my.yaml model.path=runs/my-run/hf evaluation.samples=16"),
)
