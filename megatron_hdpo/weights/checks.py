"""Results of a verification, and what all ranks agree on about one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.weights.errors import WeightsError

T = TypeVar("T")


@dataclass(frozen=True)
class Check:
    """One result of a verification. details: names and reasons if it failed."""

    name: str
    passed: bool
    summary: str
    details: tuple[str, ...] = ()


def print_checks(checks: list[Check], console: Console) -> None:
    """Print a table of the checks, and below it the details of those that failed."""
    table = Table("check", "result", "what was found")
    for check in checks:
        result = Text("passed", "green") if check.passed else Text("FAILED", "red")
        table.add_row(Text(check.name), result, Text(check.summary))
    console.print(table)
    for line in (line for check in checks if not check.passed for line in check.details):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def on_all_ranks(context: ParallelContext, action: Callable[[], T]) -> tuple[T | None, tuple[str, ...]]:
    """Run `action` on every rank; return its result, or None and the problems of all ranks if any rank failed."""
    result, problem = None, None
    try:
        result = action()
    except WeightsError as error:
        problem = str(error)
    context.barrier("checkpoint read")
    problems = dict.fromkeys(text for text in context.gather_objects(problem) if text is not None)
    return (None if problems else result), tuple(problems)
