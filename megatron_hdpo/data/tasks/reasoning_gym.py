"""Problems that reasoning-gym generates, with its own scorers (https://github.com/open-thought/reasoning-gym)."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, ClassVar, Literal

from pydantic import Field

from megatron_hdpo.data.tasks.solutions import SOLUTION_BUILDERS
from megatron_hdpo.rewards.around import plain
from megatron_hdpo.rewards.extraction import AnswerFormat, extract_answer
from megatron_hdpo.types.errors import DataError
from megatron_hdpo.types.load_report import LoadReport
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.task import TaskBase

MAX_ROUNDS = 20


class ReasoningGymTask(TaskBase):
    """A reasoning-gym set at a chosen difficulty.

    Its scorers give part of the points for answers that merely contain the gold one (0.5 for `16` where `6` is right),
    so that a group of failures would not sum to zero: by default only scores of `success_threshold` or more count.
    """

    packages: ClassVar[tuple[str, ...]] = ("reasoning_gym",)

    kind: Literal["reasoning_gym"]
    dataset: str = Field(description="Name of the reasoning-gym set, for example chain_sum.")
    size: int = Field(500, ge=1, description="Number of different problems.")
    seed: int = Field(0, description="Seed of the problems.")
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="The set's own parameters, for example its difficulty."
    )
    binary: bool = Field(
        True,
        description="true: reward 1 for a score of at least success_threshold, else 0. false: the set's own score.",
    )
    success_threshold: float = Field(1.0, gt=0, le=1, description="Least score of a right answer.")
    level_key: str | None = Field(None, description="Metadata field of the set that serves as level, e.g. num_terms.")
    answer_format: AnswerFormat = Field("boxed", description="Whether only a box counts as an answer.")

    def default_name(self) -> str:
        return self.dataset

    def problems(self, report: LoadReport) -> list[Problem]:
        """Return `size` different problems.

        Raises DataError for an unknown set, wrong parameters, or too few problems.
        """
        count = min(self.size, self.limit or self.size)
        entries: dict[str, dict[str, Any]] = {}
        for entry in self._entries():
            entries.setdefault(entry["question"], entry)
            if len(entries) == count:
                return [self._problem(index, entry) for index, entry in enumerate(entries.values())]
        raise DataError(
            f"task {self.task_name!r}: reasoning-gym's {self.dataset} gives only {len(entries)} different problems "
            f"with these parameters, {count} were asked for; lower size or widen the parameters"
        )

    def prepare(self) -> None:
        """Import reasoning-gym and build the set's scorer."""
        self._score_function()

    def score(self, problem: Problem, response: str) -> float:
        """Return the set's own score of the extracted answer, as written or as plain text; 0.0 without one.

        The scorers compare texts: to them, `$263$` is not 263.
        """
        answer = extract_answer(response, self.answer_format)
        if answer is None:
            return 0.0
        entry = {"question": problem.question, "answer": problem.answer, "metadata": problem.metadata}
        texts = dict.fromkeys((answer.text, plain(answer.text)))
        score = max(float(self._score_function()(text, entry)) for text in texts if text)
        return float(score >= self.success_threshold) if self.binary else score

    def _score_function(self) -> Any:
        return _scorer(self.dataset, json.dumps(self.parameters, sort_keys=True))

    def _entries(self) -> Iterator[dict[str, Any]]:
        for round_number in range(MAX_ROUNDS):
            yield from self._create(round_number)

    def _create(self, round_number: int) -> Any:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

        if self.dataset not in DATASETS:
            hint = _did_you_mean(self.dataset, DATASETS)
            raise DataError(f"task {self.task_name!r}: reasoning-gym has no set {self.dataset!r}{hint}")
        seed = derived_seed(self.dataset, self.seed, round_number)
        try:
            return reasoning_gym.create_dataset(self.dataset, size=self.size, seed=seed, **self.parameters)
        except (TypeError, ValueError, AssertionError) as error:
            raise DataError(
                f"task {self.task_name!r}: reasoning-gym's {self.dataset} refuses the parameters "
                f"{self.parameters}: {error}"
            ) from error

    def _problem(self, index: int, entry: dict[str, Any]) -> Problem:
        builder = SOLUTION_BUILDERS.get(self.dataset)
        level = entry["metadata"].get(self.level_key) if self.level_key else None
        return Problem(
            id=f"{self.task_name}/{index}",
            task=self.task_name,
            question=entry["question"].strip(),
            answer=str(entry["answer"]),
            solution=builder(entry) if builder else None,
            level=None if level is None else str(level),
            metadata=dict(entry["metadata"]),
        )


def derived_seed(dataset: str, seed: int, round_number: int) -> int:
    """Return a seed far from that of any other number.

    Many sets use seed + index, so that neighbouring seeds share problems.
    """
    digest = hashlib.sha256(f"{dataset}/{seed}/{round_number}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


@lru_cache(maxsize=64)
def _scorer(dataset: str, parameters: str) -> Any:
    """Return the scorer of a set; a reward worker builds nothing else of it."""
    import reasoning_gym

    return reasoning_gym.create_dataset(dataset, size=1, seed=0, **json.loads(parameters)).score_answer


def _did_you_mean(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else "; its documentation lists the names"
