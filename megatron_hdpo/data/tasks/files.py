"""Problems from files and Hugging Face datasets: rows with a question, an answer and perhaps a worked solution."""

from __future__ import annotations

import json
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
        reader = RowReader(self.task_name, self._row_keys())
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
        return RowKeys(self.question_key, self.answer_key, self.solution_key, self.level_key, self.answer_pattern)

    def _ordered_rows(self, report: LoadReport) -> Iterator[tuple[str, Any]]:
        if self.shuffle_seed is None:
            return self.rows(report)
        rows = list(self.rows(report))
        random.Random(self.shuffle_seed).shuffle(rows)
        return iter(rows)


class JsonlTask(FileTaskBase):
    """A file with one JSON object per line."""

    kind: Literal["jsonl"]
    path: Path = Field(description="The file.")

    def default_name(self) -> str:
        return self.path.stem

    def source(self) -> str:
        return str(self.path)

    def rows(self, report: LoadReport) -> Iterator[tuple[str, Any]]:
        """Yield the lines that are not blank. Raises DataError for a missing file or a line that does not parse."""
        existing(self.path, self.task_name)
        with self.path.open(encoding="utf-8-sig", errors="replace") as file:
            for number, line in enumerate(file, 1):
                where = f"{self.path}:{number}"
                if not line.strip():
                    continue
                try:
                    yield where, json.loads(line)
                except json.JSONDecodeError as error:
                    message = f"{where}: not JSON: {error.msg} at column {error.colno}"
                    report.reject(self.task_name, self.on_bad_row, "not JSON", message)


class ParquetTask(FileTaskBase):
    """A Parquet file."""

    kind: Literal["parquet"]
    path: Path = Field(description="The file.")

    def default_name(self) -> str:
        return self.path.stem

    def source(self) -> str:
        return str(self.path)

    def rows(self, report: LoadReport) -> Iterator[tuple[str, Any]]:
        """Yield all rows, counted from 1. Raises DataError for a missing file or one that is not Parquet."""
        import pyarrow
        import pyarrow.parquet

        existing(self.path, self.task_name)
        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                number = 0
                for batch in file.iter_batches(batch_size=1024):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"{self.path}:{number}", row
        except pyarrow.ArrowInvalid as error:
            raise DataError(f"task {self.task_name!r}: {self.path} is not a readable Parquet file: {error}") from error


class HuggingFaceTask(FileTaskBase):
    """A dataset that the `datasets` library loads: a name on the hub, or a local folder."""

    kind: Literal["huggingface"]
    dataset: str = Field(description="Name on the hub, or a folder.")
    subset: str | None = Field(None, description="Configuration of the dataset, where it has several.")
    split: str = Field("train", description="Split, slices allowed: train[:95%].")
    revision: str | None = Field(None, description="Commit or tag of the dataset on the hub.")

    def default_name(self) -> str:
        return Path(self.dataset).name

    def source(self) -> str:
        return f"{self.dataset}[{self.split}]"

    def rows(self, report: LoadReport) -> Iterator[tuple[str, Any]]:
        """Yield all rows of the split, counted from 1. Raises DataError when the library cannot load it."""
        import datasets

        try:
            loaded = datasets.load_dataset(self.dataset, self.subset, split=self.split, revision=self.revision)
        except Exception as error:  # the library raises its own, the hub's, pyarrow's and the operating system's errors
            raise DataError(
                f"task {self.task_name!r}: the datasets library cannot load {self.source()}: "
                f"{type(error).__name__}: {error}; check dataset, subset and split, and whether the hub can be reached"
            ) from error
        for number, row in enumerate(loaded, 1):
            yield f"{self.source()}:{number}", row


def existing(path: Path, task: str) -> None:
    """Raise DataError unless `path` is a file."""
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"task {task!r}: {path} {kind}; path must name a file (relative to {Path.cwd()})")
