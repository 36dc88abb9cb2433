"""Reward functions of a recipe: what each one is worth in the reward, and those that need nothing but the response.

The reward of a response is the sum of weight times value. One of the functions decides whether it is right.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal
from urllib.parse import urljoin, urlsplit

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_serializer, field_validator, model_validator

from megatron_hdpo.rewards.extraction import extract_answer, visible_text
from megatron_hdpo.types.plugins import LoadedReference
from megatron_hdpo.types.problem import Problem

NAME = r"[a-z][a-z0-9_]*"
_SCHEMES = ("http", "https")


class RewardFunction(BaseModel):
    """Base class of the reward functions, with the keys that all of them share.

    Each function of this package narrows `kind` to a Literal.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    _reference: LoadedReference | None = PrivateAttr(None)

    kind: str = Field("", description="The function: its kind here, or a reference to one of your own.")
    name: str | None = Field(
        None, pattern=rf"^{NAME}$", description="Name in metrics and saved rollouts; by default made from the kind."
    )
    weight: float = Field(1.0, description="Factor of its value in the reward; 0: only measured, or only decides.")
    decides_success: bool = Field(
        False,
        description="Its value, from 0 to 1, tells right from wrong: success thresholds, cliffs and pass@k refer to "
        "it. By default the task's score does.",
    )
    on_failure: Literal["drop", "stop"] = Field(
        "drop",
        description="What its failure does, once its retries are used up. drop: the sample is dropped and counted; "
        "stop: the run ends.",
    )

    @property
    def function_name(self) -> str:
        """Return the name, unique within a recipe; by default the kind, of a reference its last part in lower case."""
        return self.name or self.kind.rpartition(":")[2].lower().strip("_")

    @property
    def reference(self) -> LoadedReference | None:
        """Return what the recipe refers to; None for a function of this package."""
        return self._reference

    @field_serializer("kind")
    def _kind_as_it_is(self, kind: str) -> str:
        """Write a reference where a class inherits the Literal of a function of this package."""
        return kind

    def check(self) -> None:
        """Raise ValueError when the keys of this section do not fit what it refers to. Default: they do."""


class TaskScore(RewardFunction):
    """The score that the problem's own task gives."""

    kind: Literal["task"] = "task"


class WorkerFunction(RewardFunction):
    """Base class of the functions that run in reward workers, with their limits of time and memory.

    A class of one's own extends it: further keys are its fields, and `score` gives the value.
    """

    def prepare(self) -> None:
        """Load what `score` needs, before the first call and outside its time limit. Default: do nothing."""

    @abstractmethod
    def score(self, problem: Problem, response: str) -> float:
        """Return the value of a response. Raises if it has none; a failure is never a value."""


class AnswerFormat(WorkerFunction):
    r"""1 for a response that delimits its answer, in `\boxed{}` or in `<answer>` tags, else 0."""

    kind: Literal["format"] = "format"
    pattern: str | None = Field(
        None, description="Regular expression that must be found after the thoughts, instead of a delimited answer."
    )

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from error
        return pattern

    def score(self, problem: Problem, response: str) -> float:
        """Return 1.0 or 0.0."""
        if self.pattern is not None:
            return float(re.search(self.pattern, visible_text(response)) is not None)
        answer = extract_answer(response, "lenient")
        return float(answer is not None and answer.source in ("box", "tag"))


class OverlongPenalty(RewardFunction):
    """0 up to `max_tokens` - `buffer_tokens`, then falling to -1 at `max_tokens` (DAPO, equation 13)."""

    kind: Literal["length"] = "length"
    max_tokens: int = Field(ge=1, description="Tokens of a response from which the value is -1.")
    buffer_tokens: int = Field(ge=1, description="Tokens before that over which the value falls from 0 to -1.")

    @model_validator(mode="after")
    def _fits(self) -> OverlongPenalty:
        if self.buffer_tokens > self.max_tokens:
            raise ValueError(f"buffer_tokens: {self.buffer_tokens} is more than max_tokens {self.max_tokens}")
        return self

    def value(self, tokens: int) -> float:
        """Return the value of a response of so many tokens, the stop token included."""
        free = self.max_tokens - self.buffer_tokens
        return max(-1.0, min(0, free - tokens) / self.buffer_tokens)


class HttpService(RewardFunction):
    """A service that is asked by HTTP for the value of each response: a judge, a sandbox for code.

    docs/reward-functions.md has the requests and answers.
    """

    kind: Literal["http"] = "http"
    url: str = Field(description="Address to which a JSON object per response is posted.")
    health: str | None = Field(
        "/health",
        description="Address, or path at the same host, that answers 200 when the service is there; null: "
        "nothing is asked before the first response.",
    )
    api_key: str | None = Field(None, repr=False, description="Sent as `Authorization: Bearer ...`; never written.")
    api_key_variable: str | None = Field(None, description="Environment variable with the key, instead of `api_key`.")
    headers: dict[str, str] = Field(
        default_factory=dict, repr=False, description="Further headers of each request; their values are never written."
    )
    timeout_s: float = Field(30.0, gt=0, description="Longest wait for one answer.")
    deadline_s: float = Field(
        180.0,
        gt=0,
        description="Longest time from the first request for a response to its value, with all retries; also the "
        "longest outage of the service that samples wait for.",
    )
    max_retries: int = Field(
        5,
        ge=0,
        description="Further requests after one without an answer, or with status 408 or 5xx; those after status 429 "
        "are bounded by deadline_s alone.",
    )
    max_concurrent: int = Field(32, ge=1, description="Requests at a time from each rank that samples.")

    @field_validator("url", "health")
    @classmethod
    def _is_address(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith("/"):
            parts = urlsplit(value)
            if parts.scheme not in _SCHEMES or not parts.hostname:
                raise ValueError("must be an address such as http://host:8000/judge")
            if parts.username is not None:
                raise ValueError("must not hold a user or password: give api_key, api_key_variable or headers")
        return value

    @model_validator(mode="after")
    def _is_complete(self) -> HttpService:
        if self.url.startswith("/"):
            raise ValueError("url: must be an address such as http://host:8000/judge, not a path")
        if self.api_key is not None and self.api_key_variable is not None:
            raise ValueError("api_key: leave it out, or api_key_variable")
        return self

    @property
    def health_url(self) -> str | None:
        """Return the address that tells whether the service is there; None when it is not to be asked."""
        return None if self.health is None else urljoin(self.url, self.health)


def deciding(functions: Sequence[RewardFunction]) -> RewardFunction:
    """Return the function that decides on success: the marked one, else the task's score, else the only one.

    Raises ValueError when several are marked, or none of these is there.
    """
    marked = [function for function in functions if function.decides_success]
    if len(marked) > 1:
        raise ValueError(f"decides_success: set it for one of {', '.join(f.function_name for f in marked)}")
    candidates = marked or [f for f in functions if f.kind == "task"] or list(functions)
    if len(candidates) != 1:
        raise ValueError("decides_success: set it for the function that tells right from wrong, or add {kind: task}")
    return candidates[0]


def check_functions(functions: Sequence[RewardFunction]) -> None:
    """Raise ValueError when there are no functions, two share a name, one does not fit, or none decides on success."""
    if not functions:
        raise ValueError("name at least one function, or leave the list out: the task's score is the default")
    names = [function.function_name for function in functions]
    if wrong := next((name for name in names if not re.fullmatch(NAME, name)), None):
        raise ValueError(f"{wrong!r} cannot be the name of a metric: give a `name` of a-z, 0-9 and _")
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"functions share a name: {', '.join(sorted(twice))}; give each its own `name`")
    for function in functions:
        function.check()
    deciding(functions)
