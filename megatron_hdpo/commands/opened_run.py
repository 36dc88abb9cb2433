"""Opening of a run for the commands that hold a model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hdpo.commands.ending import end_of_stall
from megatron_hdpo.parallel.stop_request import StopRequest

if TYPE_CHECKING:
    from megatron_hdpo.training.run import Run


@contextmanager
def opened_run(
    recipe_file: Path, overrides: Sequence[str], trains: bool = False, stop_request: StopRequest | None = None
) -> Iterator[Run]:
    """Yield a built run inside its process group, and close everything at the end, also after an error.

    trains: the run resumes from its checkpoint and exports its model at the end. Without, `model.path` may be what the
    run has exported. stop_request: ends the run early when it is made.
    """
    from megatron_hdpo.config import check_sections, load_recipe
    from megatron_hdpo.config.machine import check_ranks_of_torchrun

    check_ranks_of_torchrun(os.environ)
    recipe = load_recipe(recipe_file, overrides)
    if not trains:
        checkpoint = recipe.checkpoint.model_copy(update={"export": False})
        recipe = recipe.model_copy(update={"checkpoint": checkpoint})
    check_sections(recipe)  # before the imports below, which take seconds
    from megatron_hdpo.tracking.console import Console

    leads = os.environ.get("RANK", "0") == "0"
    console = Console(enabled=leads, progress_s=recipe.tracking.progress_seconds)
    console.print("loading PyTorch and Megatron-Core ...")
    with console.phase("imports"):
        from megatron_hdpo.parallel.context import start, stop
        from megatron_hdpo.training.run import build_run, set_threads

    set_threads(recipe, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    with console.phase("join ranks"):
        context = start(recipe.parallel, recipe.device, recipe.seed, end_of_stall)
    context.heartbeat.progress, context.heartbeat.phase = console.doing, console.innermost
    with context.meetings.naming_ranks():
        run = build_run(recipe, context, resumes=trains, console=console, stop_request=stop_request)
        failed = True
        try:
            yield run
            failed = False
            context.meetings.close()  # before what takes time: rank 0 may end first, and with it the store
        finally:
            run.close(failed)
    stop()
