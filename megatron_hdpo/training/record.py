"""Record of a run in its folder: recipe, metrics and trackers, and the lock that keeps other runs out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from filelock import FileLock, Timeout

from megatron_hdpo.config import Recipe, RecipeError, save_recipe
from megatron_hdpo.config.secrets import redacted
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.tracking.console import Console
from megatron_hdpo.tracking.evaluations import Evaluations, Measured
from megatron_hdpo.tracking.metrics import read_metrics
from megatron_hdpo.tracking.tracker import Tracker
from megatron_hdpo.training.own_code import save_code


class RunRecord:
    """Record of a run; nothing is written before `open`."""

    def __init__(self, recipe: Recipe, context: ParallelContext, console: Console) -> None:
        self.recipe, self.context, self.console = recipe, context, console
        self._tracker: Tracker | None = None
        self._evaluations = Evaluations()
        self._lock: FileLock | None = None

    def open(self, resume_step: int | None) -> None:
        """Write recipe.yaml and open metrics and trackers; from now on the run folder belongs to this run. Collective.

        Call it only when everything that can be wrong with the recipe has been checked: a run that is refused must
        leave the folder of the run that it would have resumed unchanged. resume_step: the step of the loaded
        checkpoint, None at a fresh start. Raises RecipeError when another run is at work in the folder.
        """
        recipe, leader = self.recipe, self.context.is_leader
        self._lock_folder()
        tracker = Tracker(recipe.tracking, recipe.output, self.console, resume_step=resume_step, enabled=leader)
        self._tracker = tracker
        tracker.log_config(redacted(recipe.model_dump(mode="json")))
        if leader:
            save_recipe(recipe, recipe.output / "recipe.yaml")
            save_code(recipe, recipe.output / "code")
            self._evaluations = Evaluations(read_metrics(recipe.output))

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record the metrics of a step. Raises RuntimeError before `open`."""
        if self._tracker is None:
            raise RuntimeError("the record of the run is not open")
        self._tracker.log(step, metrics)

    def has_evaluation(self, step: int) -> bool:
        """Return whether metrics.jsonl holds an evaluation of this step; True on ranks that do not write it."""
        if not self.context.is_leader:
            return True
        lines = read_metrics(self.recipe.output)
        return any(name.startswith("eval/") for line in lines if line["step"] == step for name in line)

    def evaluated(self, step: int, metrics: Mapping[str, Any]) -> list[Measured]:
        """Return the shares of problems solved in a step, each with the best of the run so far; [] without any."""
        return self._evaluations.add(step, metrics)

    def close(self, failed: bool) -> None:
        """Close the trackers and release the run folder; does nothing if it was never opened."""
        if self._tracker is not None:
            self._tracker.close(failed)
        if self._lock is not None:
            self._lock.release()

    def _lock_folder(self) -> None:
        """Lock the run folder: two runs in it would overwrite each other's checkpoints.

        The system releases the lock of a process that dies.
        """
        taken = False
        if self.context.is_leader:
            self._lock = FileLock(self.recipe.output / "run.lock")
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                taken = True
        if self.context.broadcast_object(taken):
            raise RecipeError(
                f"output: another run is at work in {self.recipe.output}: wait for its end, or use another folder"
            )
