"""Interface of a task: a configuration that lists its problems and scores responses to them.

A new task is one class: derive it from `TaskBase`, give it `problems()` and `score()`, and name it in a recipe
(docs/adding-a-task.md). Instances are pickled to the reward workers, which call `score` without ever calling
`problems`: keep imports of this folder light, and load what scoring needs lazily.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_serializer

from megatron_hdpo.types.load_report import LoadReport
from megatron_hdpo.types.plugins import LoadedReference
from megatron_hdpo.types.problem import Problem

BadRowPolicy = Literal["error", "drop"]


class Task(Protocol):
    """Source of problems, and scorer of responses to them."""

    @property
    def task_name(self) -> str:
        """Return the name, unique within a run; `Problem.task` refers to it."""

    def problems(self, report: LoadReport) -> list[Problem]:
        """Return all problems, in the same order on every call. Raises DataError."""

    def content(self) -> str | None:
        """Return a digest of the file or dataset that `problems` reads; None for problems that are not to be cached."""

    def prepare(self) -> None:
        """Load what `score` needs, before the first call and outside its time limit."""

    def score(self, problem: Problem, response: str) -> float:
        """Return the reward of a response, in [0, 1]. Raises if the check itself fails; a failure is never a reward."""

    def feedback(self, problem: Problem, response: str) -> str | None:
        """Return the environment's feedback on a response, for methods that show it to the teacher; None for none."""


class TaskBase(BaseModel):
    """Base class of the tasks, with the keys that all of them share.

    Each task of this package narrows `kind` to a Literal.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    _reference: LoadedReference | None = PrivateAttr(None)

    packages: ClassVar[tuple[str, ...]] = ()
    """Packages beyond the core requirements that the task imports; a recipe is refused where one is not installed."""

    kind: str = Field("", description="The task: its kind here, or a reference to a class of your own.")
    name: str | None = Field(None, description="Name of the task in logs and metrics; by default made from its source.")
    weight: float | None = Field(
        None, gt=0, description="Share of each batch relative to the other tasks; by default the number of problems."
    )
    limit: int | None = Field(None, ge=1, description="Use at most this many problems.")

    @property
    def task_name(self) -> str:
        """Return the configured name, else the default name."""
        return self.name or self.default_name()

    @property
    def reference(self) -> LoadedReference | None:
        """Return the class that the recipe refers to; None for a task of this package."""
        return self._reference

    @field_serializer("kind")
    def _kind_as_it_is(self, kind: str) -> str:
        """Write a reference where a class inherits the Literal of a task of this package."""
        return kind

    def problems(self, report: LoadReport) -> list[Problem]:
        """Return all problems, in the same order on every call. A task defines it. Raises DataError."""
        raise NotImplementedError

    def score(self, problem: Problem, response: str) -> float:
        """Return the reward of a response, in [0, 1]. A task defines it."""
        raise NotImplementedError

    def content(self) -> str | None:
        """Return a digest of the file or dataset that `problems` reads. Default: None, nothing is cached.

        With a digest, checked problems are kept between runs (`data/cache.py`), so their metadata must be JSON.
        """
        return None

    def prepare(self) -> None:
        """Load what `score` needs. Default: do nothing."""

    def feedback(self, problem: Problem, response: str) -> str | None:
        """Return feedback on a response (which test failed, ...) that does not reveal the answer. Default: None.

        Methods that learn from feedback show it to the teacher.
        """
        return None

    def default_name(self) -> str:
        """Return a name made from the source of the problems. Default: that of the class."""
        return type(self).__name__
