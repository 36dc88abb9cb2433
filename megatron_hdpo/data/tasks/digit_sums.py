"""Sums of single digits, answered by running totals: `3+4+8=` has the answer `7=15`. A task for tests of learning.

It needs sixteen characters, models of half a million parameters learn it in minutes, and its difficulty is the number
of digits.
"""

from __future__ import annotations

import random
from itertools import accumulate
from typing import Literal

from pydantic import Field

from megatron_hdpo.types.errors import DataError
from megatron_hdpo.types.load_report import LoadReport
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.task import TaskBase

ATTEMPTS_PER_PROBLEM = 50


class DigitSumsTask(TaskBase):
    """Sum n single digits; n is the level."""

    kind: Literal["digit_sums"]
    lengths: list[int] = Field(min_length=1, description="Numbers of digits to sum; each gets an equal share.")
    size: int = Field(256, ge=1, description="Number of different problems, all lengths together.")
    seed: int = Field(0, description="Seed of the problems.")

    def default_name(self) -> str:
        return "digit_sums"

    def problems(self, report: LoadReport) -> list[Problem]:
        """Return different problems, cycling through the lengths. Raises DataError when there are not that many."""
        if min(self.lengths) < 2:
            raise DataError(f"task {self.task_name!r}: lengths holds {min(self.lengths)}, a sum needs 2 digits or more")
        rng = random.Random(f"digit_sums/{self.seed}")
        seen: set[tuple[int, ...]] = set()
        count = min(self.size, self.limit or self.size)
        return [
            self._problem(i, self._new_digits(self.lengths[i % len(self.lengths)], rng, seen)) for i in range(count)
        ]

    def score(self, problem: Problem, response: str) -> float:
        """Return 1.0 when the last running total is the sum, else 0.0."""
        return float(response.strip().rpartition("=")[2] == problem.answer)

    def _new_digits(self, length: int, rng: random.Random, seen: set[tuple[int, ...]]) -> tuple[int, ...]:
        for _ in range(ATTEMPTS_PER_PROBLEM):
            digits = tuple(rng.randrange(10) for _ in range(length))
            if digits not in seen:
                seen.add(digits)
                return digits
        raise DataError(
            f"task {self.task_name!r}: too few different sums of {length} digits for size {self.size}; "
            "lower size or use longer lengths"
        )

    def _problem(self, index: int, digits: tuple[int, ...]) -> Problem:
        totals = list(accumulate(digits))
        return Problem(
            id=f"{self.task_name}/{index}",
            task=self.task_name,
            question="+".join(map(str, digits)) + "=",
            answer=str(totals[-1]),
            solution="=".join(map(str, totals[1:])),
            level=str(len(digits)),
        )
