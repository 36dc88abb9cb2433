"""`megatron_hdpo train`."""

from __future__ import annotations

import argparse

from megatron_hdpo.commands.base import Command, add_recipe
from megatron_hdpo.commands.opened_run import opened_run
from megatron_hdpo.commands.report import show_report


def _train(arguments: argparse.Namespace) -> None:
    with opened_run(arguments.recipe, arguments.overrides, trains=True) as run:
        from megatron_hdpo.training.loop import train  # here: `opened_run` says first what takes seconds to import

        train(run)
        folder = run.recipe.output if run.context.is_leader else None
    if folder is not None:
        show_report(folder)


COMMAND = Command(
    "train",
    "Train, or resume the run in the output folder.",
    add_recipe,
    _train,
    description="One rank without torchrun; more ranks: torchrun --nproc-per-node N -m megatron_hdpo train ...",
    examples=("examples/digit_sums/hdpo.yaml", "my.yaml train.steps=10 output=runs/short"),
    interrupted="interrupted: run the same command again to resume from the last checkpoint, where there is one",
)
