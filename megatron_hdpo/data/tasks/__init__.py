"""Tasks by kind.

Imports `types` and `data`. To add a task, write its class (`types.task.TaskBase`) and list it in `TaskConfig`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megatron_hdpo.data.tasks.digit_sums import DigitSumsTask
from megatron_hdpo.data.tasks.file_formats import CsvTask, JsonlTask, JsonTask, ParquetTask
from megatron_hdpo.data.tasks.hugging_face import HuggingFaceTask
from megatron_hdpo.data.tasks.knights_knaves import KnightsKnavesTask
from megatron_hdpo.data.tasks.letter_choice import LetterChoiceTask
from megatron_hdpo.data.tasks.reasoning_gym import ReasoningGymTask
from megatron_hdpo.types.task import Task, TaskBase

TaskConfig = Annotated[
    DigitSumsTask
    | KnightsKnavesTask
    | LetterChoiceTask
    | ReasoningGymTask
    | JsonlTask
    | JsonTask
    | CsvTask
    | ParquetTask
    | HuggingFaceTask,
    Field(discriminator="kind"),
]

__all__ = [
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
