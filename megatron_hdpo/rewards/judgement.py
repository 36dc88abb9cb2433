"""Judgements of responses, and the weighted sum of those of several reward functions."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

from megatron_hdpo.rewards.functions import RewardFunction, deciding

T = TypeVar("T")


@dataclass(frozen=True)
class Judgement:
    """The result of a check: a reward, or None and the error that prevented it.

    seconds: time in the worker; for a failed check, time since it was submitted; of several reward functions, that of
    the slowest. feedback: text about the response, None without any. components: the value of each reward function by
    its name; empty where the task's score alone is the reward. decided_by: the function that tells right from wrong,
    "" where the reward does. failed: the function that failed, "" if there are no others. ends_run: whether its failure
    is to end the run.
    """

    reward: float | None
    error: str | None
    seconds: float
    feedback: str | None = None
    components: Mapping[str, float] = field(default_factory=dict)
    decided_by: str = ""
    failed: str = ""
    ends_run: bool = False


def combined(functions: Sequence[RewardFunction], judgements: Sequence[Judgement]) -> Judgement:
    """Return the judgement of a response by all functions: its reward is the sum of weight times value.

    judgements: one per function, in their order. If one of them has no reward, neither has the response: a sum without
    it would be another reward than that of the other samples.
    """
    seconds = max(judgement.seconds for judgement in judgements)
    decided_by = deciding(functions).function_name
    values: dict[str, float] = {}
    for function, judgement in zip(functions, judgements, strict=True):
        error = judgement.error if judgement.reward is None else _problem(function, judgement.reward, decided_by)
        if judgement.reward is None or error:
            name = function.function_name
            stops = function.on_failure == "stop"
            return Judgement(None, f"reward function {name!r}: {error}", seconds, failed=name, ends_run=stops)
        values[function.function_name] = judgement.reward
    reward = math.fsum(function.weight * values[function.function_name] for function in functions)
    feedback = [judgement.feedback for judgement in judgements if judgement.feedback]
    return Judgement(reward, None, seconds, "\n\n".join(feedback) or None, values, decided_by)


def _problem(function: RewardFunction, value: float, decided_by: str) -> str:
    """Return why a value cannot be used; "" if it can."""
    if not math.isfinite(value):
        return f"its value is {value}"
    if function.function_name == decided_by and not 0.0 <= value <= 1.0:
        return f"its value is {value:g}, and what decides on success lies between 0 and 1"
    return ""


def all_of(futures: Sequence[Future[T]]) -> Future[list[T]]:
    """Return a future of the results of futures that never fail, in their order."""
    gathered: Future[list[T]] = Future()
    lock, open_futures = threading.Lock(), len(futures)

    def count(_: Future[T]) -> None:
        nonlocal open_futures
        with lock:
            open_futures -= 1
            is_last = not open_futures
        if is_last:
            gathered.set_result([future.result() for future in futures])

    for future in futures:
        future.add_done_callback(count)
    return gathered
