"""Problems from one file: JSON lines, a JSON list, CSV, Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TextIO

from pydantic import Field, field_validator

from megatron_hdpo.data.tasks.files import FileTask
from megatron_hdpo.data.tasks.strict_json import parse
from megatron_hdpo.types.errors import DataError
from megatron_hdpo.types.load_report import LoadReport


class JsonlTask(FileTask):
    """A file with one JSON object per line."""

    kind: Literal["jsonl"]

    def rows(self, report: LoadReport) -> Iterator[tuple[str, Any]]:
        """Yield the lines that are not blank. Raises DataError for a missing file or a line that does not parse."""
        with _open(self.existing_path()) as file:
            for number, line in enumerate(file, 1):
                where = f"{self.path}:{number}"
                if not line.strip():
                    continue
                try:
                    row = parse(line)
                    if number == 1 and isinstance(row, list):
                        raise DataError(
                            f"task {self.task_name!r}: {where}: is a JSON list; for a file that is one list of objects "
                            "write kind: json"
                        )
                    yield where, row
                except DataError:
                    raise
                except ValueError as error:
                    message = f"{where}: not JSON: {_reason(error)}"
                    report.reject(self.task_name, self.on_bad_row, "not JSON", message)


class JsonTask(FileTask):
    """A file that holds one JSON list of objects."""

    kind: Literal["json"]

    def rows(self, report: LoadReport) -> Iterator[tuple[str, Any]]:
        """Yield the items of the list, counted from 1. Raises DataError for a file that holds anything else."""
        with _open(self.existing_path()) as file:
            try:
                items = parse(file.read())
            except ValueError as error:
                line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
                raise DataError(
                    f"task {self.task_name!r}: {self.path}{line} is not JSON: {_reason(error)}; for one object per "
                    "line write kind: jsonl"
                ) from error
        if not isinstance(items, list):
            raise DataError(
                f"task {self.task_name!r}: {self.path} holds one {type(items).__name__}; kind: json reads a list of "
                "objects"
            )
        for number, item in enumerate(items, 1):
            yield f"{self.path}:{number}", item


class CsvTask(FileTask):
    """A CSV file whose first line names the columns. Every value is a text."""

    kind: Literal["csv"]
    delimiter: str = Field(",", pattern='^[^\r\n"]$', description="Character between the columns of a line.")

    @field_validator("filter")
    @classmethod
    def _filters_texts(cls, wanted: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for key, values in wanted.items():
            if others := [value for value in values if not isinstance(value, str)]:
                raise ValueError(f"{key} lists {others[0]!r}, and the values of a CSV file are texts: write quotes")
        return wanted

    def rows(self, report: LoadReport) -> Iterator[tuple[str, Any]]:
        """Yield the rows, numbered by their first line. Raises DataError for a wrong header or a broken row."""
        with _open(self.existing_path(), newline="") as file:
            lines = csv.reader(file, delimiter=self.delimiter, strict=True)
            header = self._header(lines)
            while True:
                where = f"{self.path}:{lines.line_num + 1}"
                try:
                    values = next(lines)
                except StopIteration:
                    return
                except csv.Error as error:
                    report.reject(
                        self.task_name,
                        self.on_bad_row,
                        "not CSV",
                        f"{where}: not CSV up to line {lines.line_num}: {error}",
                    )
                    continue
                if len(values) == len(header):
                    yield where, dict(zip(header, values, strict=True))
                elif values:
                    message = f"{where}: has {len(values)} values, the header names {len(header)} columns"
                    report.reject(self.task_name, self.on_bad_row, "wrong number of values", message)

    def _header(self, lines: Iterator[list[str]]) -> list[str]:
        try:
            header = next(lines, [])
        except csv.Error as error:
            raise DataError(f"task {self.task_name!r}: {self.path}:1: not CSV: {error}") from error
        if len(header) == 1 and (other := next((c for c in ";\t|" if c in header[0]), None)):
            raise DataError(
                f"task {self.task_name!r}: {self.path}:1: the header names one column, {header[0]!r}: write "
                f"delimiter: {other!r}"
            )
        twice = sorted({name for name in header if header.count(name) > 1})
        if not header or twice:
            problem = f"names the column {twice[0]!r} twice" if twice else "is empty"
            raise DataError(f"task {self.task_name!r}: {self.path}:1: the header {problem}; it must name every column")
        return header


class ParquetTask(FileTask):
    """A Parquet file."""

    kind: Literal["parquet"]

    def rows(self, report: LoadReport) -> Iterator[tuple[str, Any]]:
        """Yield all rows, counted from 1. Raises DataError for a missing file or one that is not whole."""
        number = 0
        for batch in self._batches():
            for row in self._rows_of(batch, number, report):
                number += 1
                if row is not None:
                    yield f"{self.path}:{number}", row

    def _rows_of(self, batch: Any, before: int, report: LoadReport) -> list[dict[str, Any] | None]:
        """Return the rows of a batch, None for one that cannot be read. before: number of rows before the batch."""
        try:
            return list(batch.to_pylist())
        except (ValueError, OverflowError):  # text that is not UTF-8, a date that Python does not know
            return [self._row(batch.slice(index, 1), before + index + 1, report) for index in range(batch.num_rows)]

    def _row(self, batch: Any, number: int, report: LoadReport) -> dict[str, Any] | None:
        try:
            return dict(batch.to_pylist()[0])
        except (ValueError, OverflowError) as error:
            message = f"{self.path}:{number}: cannot be read: {error}"
            report.reject(self.task_name, self.on_bad_row, "not readable", message)
            return None

    def _batches(self) -> Iterator[Any]:
        """Yield record batches. Raises DataError: pyarrow says of damage all that the operating system may say too."""
        import pyarrow
        import pyarrow.parquet

        path = self.existing_path()
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                names = file.schema_arrow.names
                if twice := next((name for name in names if names.count(name) > 1), None):
                    raise ValueError(f"it has the column {twice!r} twice")
                yield from file.iter_batches(batch_size=1024)
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
            reason = " ".join(str(error).split())[:300]
            raise DataError(f"task {self.task_name!r}: {path} is not a readable Parquet file: {reason}") from error


def _open(path: Path, newline: str | None = None) -> TextIO:
    """Open a text file such that a byte that is not UTF-8 becomes a lone surrogate, which makes its row a bad one."""
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _reason(error: ValueError) -> str:
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
