"""One run of the comparison, trained to its end in this process.

Besides the usual metrics, each step has `compare/signal_rate`: the share of the sampled groups that can change the
policy, as the method itself defines it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import _part  # noqa: F401
import torch

from megatron_hdpo.config import Recipe
from megatron_hdpo.parallel.context import start, stop
from megatron_hdpo.training.loop import train
from megatron_hdpo.training.run import build_run
from megatron_hdpo.types.learning import Objective
from megatron_hdpo.types.rollouts import Group, JudgedGroup

SIGNAL = "compare/signal_rate"


def run_recipe(recipe: Recipe, log: Path) -> None:
    """Train to the recipe's last step and write the output into the file `log`. Needs its own process."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    run = build_run(recipe, start(recipe.parallel, "cpu", recipe.seed))
    _record_signal(run.objective)
    finished = False
    try:
        train(run)
        finished = True
    finally:
        run.close(failed=not finished)
    stop()


def _record_signal(objective: Objective) -> None:
    """Add the share of groups with signal to the method's own metrics."""
    counts_of_the_method, metrics_of_the_method = objective.counts, objective.metrics

    def counts(groups: Sequence[Group]) -> dict[str, float]:
        signal = sum(objective.has_signal(group) for group in groups if group.samples)
        return counts_of_the_method(groups) | {SIGNAL: float(signal)}

    def metrics(groups: Sequence[JudgedGroup], counts: Mapping[str, float]) -> dict[str, float]:
        judged = sum(bool(group.samples) for group in groups)
        return metrics_of_the_method(groups, counts) | ({SIGNAL: counts[SIGNAL] / judged} if judged else {})

    objective.counts, objective.metrics = counts, metrics  # type: ignore[method-assign]
