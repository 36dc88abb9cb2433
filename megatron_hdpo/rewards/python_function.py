"""A reward function of one's own: a Python function or class that the recipe names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from megatron_hdpo.rewards.functions import WorkerFunction
from megatron_hdpo.types.plugins import FORMS, LoadedReference, PluginError, load_reference
from megatron_hdpo.types.problem import Problem

GROUP = "megatron_hdpo.rewards"
"""Entry points by which an installed package offers reward functions."""


class PythonFunction(WorkerFunction):
    """A Python function, or a class whose objects are called; it runs in the reward workers.

    It is called with the problem and the text of the response, and returns a number. It raises if it cannot tell.
    """

    kind: Literal["python"] = "python"
    function: str = Field(
        description=f"The function or class: {FORMS}, or an entry point in {GROUP} of an installed package."
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments, by name: of each call, or of a class when it is made."
    )

    _reference: LoadedReference = PrivateAttr()
    _call: Callable[..., Any] | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _can_be_called(self) -> PythonFunction:
        """Load the reference, and compare its parameters with the arguments. Nothing is called yet."""
        try:
            self._reference = load_reference(self.function, GROUP)
        except PluginError as error:
            raise ValueError(f"function: {error}") from error
        made = self._reference.value
        if not callable(made):
            raise ValueError(f"function: {self.function} is {type(made).__name__}, neither a function nor a class")
        positional = () if isinstance(made, type) else ("problem", "response")
        try:
            inspect.signature(made).bind(*positional, **self.arguments)
        except TypeError as error:
            raise ValueError(f"arguments: {self.function}: {error}") from error
        return self

    @property
    def reference(self) -> LoadedReference:
        """Return what the recipe refers to, with its source file."""
        return self._reference

    @property
    def function_name(self) -> str:
        """Return the name; by default that of the function or class, in lower case."""
        return self.name or self.function.rpartition(":")[2].lower().lstrip("_")

    def prepare(self) -> None:
        """Make the object of a class."""
        made = self._reference.value
        self._call = made(**self.arguments) if isinstance(made, type) else None

    def score(self, problem: Problem, response: str) -> float:
        """Return what the function returns, which the worker checks."""
        if self._call is not None:
            return self._call(problem, response)
        return self._reference.value(problem, response, **self.arguments)
