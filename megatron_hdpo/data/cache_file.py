"""Checked problems as a Parquet file: written and read in groups of rows, so that no whole copy is held besides."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow
import pyarrow.parquet

from megatron_hdpo.data.checked import CheckedProblems
from megatron_hdpo.types.load_report import LoadReport
from megatron_hdpo.types.problem import Problem

GROUP_ROWS = 50_000
_ABOUT = b"megatron_hdpo.about"
_TEXTS = ("id", "task", "question", "answer", "solution", "level", "source")
_SCHEMA = pyarrow.schema(
    [
        *((name, pyarrow.large_string()) for name in _TEXTS),
        ("metadata", pyarrow.large_string()),
        ("question_hash", pyarrow.uint64()),
    ]
)


class NotStorable(ValueError):
    """Problems that would not come back equal: their metadata is not JSON, or their text is not Unicode."""


def write_problems(checked: CheckedProblems, file: Path) -> None:
    """Write problems, question hashes and report. Raises NotStorable for problems that would not come back equal."""
    names = ("counts", "examples", "cut", "escaped", "first_escaped")
    report = {name: getattr(checked.report, name) for name in names}
    schema = _SCHEMA.with_metadata({_ABOUT: orjson.dumps({"report": report, "certain": checked.certain})})
    with pyarrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        for start in range(0, len(checked.problems), GROUP_ROWS):
            rows = slice(start, start + GROUP_ROWS)
            writer.write_table(_table(checked.problems[rows], checked.question_hashes[rows], schema))


def read_problems(file: Path) -> CheckedProblems:
    """Return what `write_problems` wrote."""
    problems, hashes = list[Problem](), [np.empty(0, np.uint64)]
    with pyarrow.parquet.ParquetFile(file, memory_map=True) as opened, _garbage_uncollected():
        about = orjson.loads(opened.schema_arrow.metadata[_ABOUT])
        for index in range(opened.num_row_groups):
            group = opened.read_row_group(index)
            problems.extend(_problems(group))
            hashes.append(group["question_hash"].to_numpy())
    return CheckedProblems(problems, np.concatenate(hashes), LoadReport(**about["report"]), about["certain"])


@contextmanager
def _garbage_uncollected() -> Iterator[None]:
    """Pause the garbage collector, which would walk millions of new objects again and again and find no garbage."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _table(problems: Sequence[Problem], hashes: np.ndarray, schema: pyarrow.Schema) -> pyarrow.Table:
    columns: list[Sequence[Any]] = [[getattr(problem, name) for problem in problems] for name in _TEXTS]
    metadata = [_as_json(problem) for problem in problems]
    try:
        return pyarrow.table([*columns, metadata, hashes], schema=schema)
    except (UnicodeEncodeError, pyarrow.ArrowException) as error:
        raise NotStorable(f"their text cannot be stored: {error}") from error


def _problems(group: pyarrow.Table) -> Iterator[Problem]:
    texts = (group[name].to_pylist() for name in _TEXTS)
    return map(Problem, *texts, map(orjson.loads, group["metadata"].to_pylist()))


def _as_json(problem: Problem) -> str:
    try:
        text = orjson.dumps(problem.metadata)
        equal = orjson.loads(text) == problem.metadata
    except (TypeError, ValueError) as error:
        raise NotStorable(f"{problem.id}: its metadata is not JSON: {error}") from error
    if not equal:
        raise NotStorable(f"{problem.id}: its metadata does not come back equal from JSON")
    return text.decode()
