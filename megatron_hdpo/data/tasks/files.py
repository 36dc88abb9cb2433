"""Base of the tasks that read rows with a question, an answer and perhaps a worked solution.

`file_formats.py` has one task for each format of a file, `hugging_face.py` the one for datasets.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from megatron_hdpo.data.tasks.rows import BadRow, RowKeys, RowReader, question_key
from megatron_hdpo.rewards.exact import score_exact
from megatron_hdpo.rewards.extraction import AnswerFormat
from megatron_hdpo.types.errors import DataError
from megatron_hdpo.types.load_report import LoadReport
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.task import BadRowPolicy, TaskBase


class FileTaskBase(TaskBase):
    """Keys of all tasks that read rows. Keys of nested rows are joined by dots: `reward_model.ground_truth`."""

    scorer: Literal["math", "exact"] = Field("math", description="math: math-verify; exact: normalised equal text.")
    answer_format: AnswerFormat = Field("boxed", description="Whether only a box counts as an answer.")
    question_key: str = Field("problem", description="Key of the question.")
    answer_key: str | None = Field(
        "answer", description="Key of the final answer; null takes the last box of the solution."
    )
    answer_pattern: str | None = Field(
        None,
        description="Regular expression whose first group is the answer within the text; its last match counts.",
    )
    solution_key: str = Field("solution", description="Key of the worked solution; rows may lack it.")
    level_key: str = Field("level", description="Key of the difficulty; rows may lack it.")
    source_key: str | None = Field(
        None, description="Key of where a row comes from, such as subject; rows may lack it. null: not read."
    )
    filter: dict[str, list[Any]] = Field(
        default_factory=dict, description="Use only rows whose value at each of these keys is one of the listed ones."
    )
    shuffle_seed: int | None = Field(None, description="Shuffle the rows with this seed before limit is applied.")
    on_bad_row: BadRowPolicy = Field("error", description="Stop at a row that cannot be used, or drop and count it.")

    @field_validator("answer_pattern")
    @classmethod
    def _has_a_group(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                groups = re.compile(pattern).groups
            except re.error as error:
                raise ValueError(f"answer_pattern is not a regular expression: {error}") from error
            if groups < 1:
                raise ValueError("answer_pattern needs a group (...) around the answer")
        return pattern

    @property
    def needs_parsed_gold(self) -> bool:
        """Return whether every gold answer must parse as an expression, which is checked at load."""
        return self.scorer == "math"

    def rows(self, report: LoadReport) -> Iterator[tuple[str, Any]]:
        """Yield (where, row) pairs in file order; `where` names file and line."""
        raise NotImplementedError

    def problems(self, report: LoadReport) -> list[Problem]:
        """Return the rows as problems, filtered, without duplicates, at most `limit`.

        Gold answers are parsed later, all at once. Raises DataError for a source that cannot be read, for a bad row
        (unless on_bad_row is drop), and when no problem is left.
        """
        problems = list(self._problems(report))
        if not problems:
            raise DataError(f"task {self.task_name!r}: no problem is left of {self.source()}; check filter and limit")
        return problems

    def prepare(self) -> None:
        """Import sympy and math-verify, so that the first check does not pay for it (half a second)."""
        if self.scorer == "math":
            import megatron_hdpo.rewards.math  # noqa: F401

    def score(self, problem: Problem, response: str) -> float:
        """Return 1.0 when the final answer in `response` is right, else 0.0."""
        if self.scorer == "exact":
            return score_exact(problem.answer, response, self.answer_format)
        from megatron_hdpo.rewards.math import score_math

        return score_math(problem.answer, response, self.answer_format)

    def source(self) -> str:
        """Return the name of the source, for messages."""
        raise NotImplementedError

    def _problems(self, report: LoadReport) -> Iterator[Problem]:
        reader = RowReader(self.task_name, self._row_keys(), expressions=self.needs_parsed_gold)
        seen: dict[str, str] = {}
        kept = 0
        for where, row in self._ordered_rows(report):
            if kept == self.limit:
                return
            try:
                if not reader.selected(row, self.filter):
                    continue
                problem = reader.problem(row, where)
                first = seen.setdefault(question_key(problem.question), where)
                if first != where:
                    raise BadRow("duplicate question", f"has the same question as {first}")
            except BadRow as bad:
                report.reject(self.task_name, self.on_bad_row, bad.reason, f"{where}: {bad}")
                continue
            kept += 1
            yield problem

    def _row_keys(self) -> RowKeys:
        return RowKeys(
            question=self.question_key,
            answer=self.answer_key,
            solution=self.solution_key,
            level=self.level_key,
            source=self.source_key,
            answer_pattern=self.answer_pattern,
        )

    def _ordered_rows(self, report: LoadReport) -> Iterator[tuple[str, Any]]:
        if self.shuffle_seed is None:
            return self.rows(report)
        rows = list(self.rows(report))
        random.Random(self.shuffle_seed).shuffle(rows)
        return iter(rows)


class FileTask(FileTaskBase):
    """Base of the tasks that read one file."""

    path: Path = Field(description="The file.")

    def default_name(self) -> str:
        return self.path.stem

    def source(self) -> str:
        return str(self.path)

    def content(self) -> str:
        """Return a digest of the file's bytes. Raises DataError for a missing file."""
        with self.existing_path().open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def existing_path(self) -> Path:
        """Return the path. Raises DataError unless it is a file."""
        if not self.path.is_file():
            kind = "is a folder" if self.path.is_dir() else "does not exist"
            raise DataError(
                f"task {self.task_name!r}: {self.path} {kind}; path must name a file (relative to {Path.cwd()})"
            )
        return self.path
