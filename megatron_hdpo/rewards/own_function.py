"""Reward functions of one's own: a Python function or a class that a recipe refers to."""

from __future__ import annotations

import inspect
from typing import Any

from pydantic import Field

from megatron_hdpo.rewards.functions import WorkerFunction
from megatron_hdpo.types.plugins import LoadedReference, PluginError
from megatron_hdpo.types.problem import Problem

GROUP = "megatron_hdpo.rewards"
"""Entry points by which an installed package offers reward functions."""


class OwnFunction(WorkerFunction):
    """A Python function. It gets the problem and the text of the response, and returns a number, or raises."""

    arguments: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of each call, by the names of the function's parameters."
    )

    def check(self) -> None:
        """Raise ValueError when the function does not take these arguments. Nothing is called."""
        assert self._reference is not None
        try:
            inspect.signature(self._reference.value).bind("problem", "response", **self.arguments)
        except TypeError as error:
            raise ValueError(f"{self.kind}: {error}") from error

    def score(self, problem: Problem, response: str) -> float:
        """Return what the function returns; the worker checks that it is a number."""
        assert self._reference is not None
        value: float = self._reference.value(problem, response, **self.arguments)
        return value


def own_function(loaded: LoadedReference) -> type[WorkerFunction]:
    """Return the class of the section for a function or class that a recipe refers to.

    Raises PluginError for anything else.
    """
    found = loaded.value
    if inspect.isfunction(found):
        return OwnFunction
    if not (isinstance(found, type) and issubclass(found, WorkerFunction)):
        raise PluginError(
            f"{loaded.reference} is no reward function: it must be a Python function, or a class that extends "
            "megatron_hdpo.rewards.functions.WorkerFunction"
        )
    if inspect.isabstract(found):
        raise PluginError(f"{loaded.reference} is no reward function yet: it has no score")
    return found
