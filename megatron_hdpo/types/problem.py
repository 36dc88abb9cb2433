"""Verifiable problem: the question for the model, and its right answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Problem:
    """Verifiable problem with its gold answer.

    id: unique within a run and stable between runs (`<task name>/<index>`); data order, seeds and logs refer to it.
    task: name of the task that made the problem, and that scores responses to it.
    question: what the model is asked, plain text without any prompt template.
    answer: the gold final answer, parsed once at load.
    solution: a worked solution that ends in the answer, when the source has one.
    level: difficulty as the row states it, for the accuracy by level (evaluation).
    source: where the row says that it comes from (a competition, a subject), for the accuracy by source.
    metadata: whatever the task's scorer needs; must be picklable.
    """

    id: str
    task: str
    question: str
    answer: str
    solution: str | None = None
    level: str | None = None
    source: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict, compare=False)
