"""`megatron_hdpo evaluate`."""

from __future__ import annotations

import argparse

from megatron_hdpo.commands.base import Command, add_recipe
from megatron_hdpo.commands.opened_run import opened_run


def _evaluate(arguments: argparse.Namespace) -> None:
    from megatron_hdpo.training.loop import evaluate_now

    with opened_run(arguments) as run:
        run.sync(0)
        metrics = evaluate_now(run)
        run.console.table("Evaluation", [{"metric": name, "value": value} for name, value in metrics.items()])


COMMAND = Command(
    "evaluate",
    "Evaluate the model of a recipe on its held-out problems.",
    add_recipe,
    _evaluate,
    examples=("my.yaml", "my.yaml model.path=runs/my-run/hf evaluation.samples=16"),
)
