"""Tasks by kind.

Imports `types` and `data`. A task of your own needs no change here (docs/adding-a-task.md); one for everybody is listed
in `TASKS`.
"""

from __future__ import annotations

from typing import Annotated

from megatron_hdpo.data.tasks.digit_sums import DigitSumsTask
from megatron_hdpo.data.tasks.file_formats import CsvTask, JsonlTask, JsonTask, ParquetTask
from megatron_hdpo.data.tasks.hugging_face import HuggingFaceTask
from megatron_hdpo.data.tasks.knights_knaves import KnightsKnavesTask
from megatron_hdpo.data.tasks.letter_choice import LetterChoiceTask
from megatron_hdpo.data.tasks.reasoning_gym import ReasoningGymTask
from megatron_hdpo.types.open_union import OpenUnion
from megatron_hdpo.types.plugins import LoadedReference, PluginError
from megatron_hdpo.types.task import Task, TaskBase

GROUP = "megatron_hdpo.tasks"
"""Entry points by which an installed package offers tasks."""

TASKS: tuple[type[TaskBase], ...] = (
    DigitSumsTask,
    KnightsKnavesTask,
    LetterChoiceTask,
    ReasoningGymTask,
    JsonlTask,
    JsonTask,
    CsvTask,
    ParquetTask,
    HuggingFaceTask,
)
"""The tasks of this package."""


def own_task(loaded: LoadedReference) -> type[TaskBase]:
    """Return the class of a task that a recipe refers to. Raises PluginError for anything else."""
    found = loaded.value
    if not (isinstance(found, type) and issubclass(found, TaskBase)):
        raise PluginError(f"{loaded.reference} is no task: its class must extend megatron_hdpo.types.task.TaskBase")
    missing = [name for name in ("problems", "score") if getattr(found, name) is getattr(TaskBase, name)]
    if missing:
        raise PluginError(f"{loaded.reference} is no task yet: it has no {' and no '.join(missing)}")
    return found


TaskConfig = Annotated[TaskBase, OpenUnion(TASKS, "kind", GROUP, own_task)]
"""Section of a task: one of TASKS, chosen by its kind, or a class that the kind refers to."""

__all__ = [
    "TASKS",
    "CsvTask",
    "DigitSumsTask",
    "HuggingFaceTask",
    "JsonTask",
    "JsonlTask",
    "KnightsKnavesTask",
    "LetterChoiceTask",
    "ParquetTask",
    "ReasoningGymTask",
    "Task",
    "TaskBase",
    "TaskConfig",
]
