"""What every task is: a configuration that can list its problems and score a response to one of them.

A new task is one class: derive it from `TaskBase`, give it a `kind`, `problems()` and `score()`, and name it in
`data.tasks.TaskConfig`. Instances are pickled to the reward workers, which call `score` without ever calling
`problems`: keep imports of this folder light, and load what scoring needs lazily.
"""

from __future__ import annotations

from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from megatron_hdpo.types.load_report import LoadReport
from megatron_hdpo.types.problem import Problem

BadRowPolicy = Literal["error", "drop"]


class Task(Protocol):
    """Where problems come from and how responses to them are scored."""

    @property
    def task_name(self) -> str:
        """Unique within a run; `Problem.task` refers to it."""

    def problems(self, report: LoadReport) -> list[Problem]:
        """All problems, in an order that is the same on every call. Raises DataError."""

    def prepare(self) -> None:
        """Load what `score` needs, ahead of the first call and of its time limit."""

    def score(self, problem: Problem, response: str) -> float:
        """Reward in [0, 1] of a response. Raises when the check itself fails; a failure is never a reward."""

    def feedback(self, problem: Problem, response: str) -> str | None:
        """What the environment says of a response, for methods that show it to the teacher; None for nothing."""


class TaskBase(BaseModel):
    """Keys that all tasks share."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = Field(None, description="Name of the task in logs and metrics; by default made from its source.")
    weight: float | None = Field(
        None, gt=0, description="Share of each batch relative to the other tasks; by default the number of problems."
    )
    limit: int | None = Field(None, ge=1, description="Use at most this many problems.")

    @property
    def task_name(self) -> str:
        """The configured name, else the one that the source suggests."""
        return self.name or self.default_name()

    def prepare(self) -> None:
        """Load what `score` needs; nothing by default."""

    def feedback(self, problem: Problem, response: str) -> str | None:
        """What the environment says of a response (which test failed, ...), without giving the answer away: methods
        that learn from feedback show it to the teacher. None, the default, for nothing to say."""
        return None

    def default_name(self) -> str:
        """Name made from the source of the problems."""
        raise NotImplementedError
