"""The source of rows for a task with its own format: a file, or a Hugging Face dataset."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron_hdpo.data.tasks.file_formats import CsvTask, JsonlTask, JsonTask, ParquetTask
from megatron_hdpo.data.tasks.files import FileTaskBase
from megatron_hdpo.data.tasks.hugging_face import HuggingFaceTask
from megatron_hdpo.types.load_report import LoadReport
from megatron_hdpo.types.task import BadRowPolicy

_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


class RowSource(BaseModel):
    """A file, its format told by its suffix, or a dataset."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    path: Path | None = Field(None, description="A file: .jsonl, .json (a list), .csv or .parquet.")
    dataset: str | None = Field(None, description="In place of path: name on the Hugging Face hub, or a folder.")
    subset: str | None = Field(None, description="Configuration of the dataset, where it has several.")
    split: str = Field("train", description="Split of the dataset, slices allowed: train[:95%].")
    revision: str | None = Field(None, description="Commit or tag of the dataset on the hub.")

    @model_validator(mode="after")
    def _one_of_two(self) -> RowSource:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give either path or dataset")
        if self.path is not None and self.path.suffix not in _SUFFIXES:
            raise ValueError(f"path must end in {', '.join(_SUFFIXES)}, not {self.path.suffix or 'none of them'}")
        return self

    @property
    def name(self) -> str:
        """Return the task name that the source suggests."""
        return (self.path.stem if self.path is not None else Path(self.dataset or "").name) or "rows"

    def rows(self, task: str, on_bad_row: BadRowPolicy, report: LoadReport) -> Iterator[tuple[str, Any]]:
        """Yield (where, row) pairs in order, `where` ending in `:number`; bad lines are counted for `task`.

        Raises DataError for a source that cannot be read.
        """
        return self._reader(task, on_bad_row).rows(report)

    def content(self, task: str) -> str | None:
        """Return a digest of what `rows` reads. Raises DataError for a source that cannot be read."""
        return self._reader(task, "error").content()

    def _reader(self, task: str, on_bad_row: BadRowPolicy) -> FileTaskBase:
        if self.path is None:
            assert self.dataset is not None
            where = {"subset": self.subset, "split": self.split, "revision": self.revision}
            return HuggingFaceTask(kind="huggingface", dataset=self.dataset, name=task, on_bad_row=on_bad_row, **where)
        common = {"path": self.path, "name": task, "on_bad_row": on_bad_row}
        match self.path.suffix:
            case ".parquet":
                return ParquetTask(kind="parquet", **common)
            case ".csv":
                return CsvTask(kind="csv", **common)
            case ".json":
                return JsonTask(kind="json", **common)
        return JsonlTask(kind="jsonl", **common)
