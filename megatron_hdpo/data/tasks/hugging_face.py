"""Problems from datasets that the `datasets` library reads: on the hub, or in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from megatron_hdpo.data.tasks.files import FileTaskBase
from megatron_hdpo.types.errors import DataError
from megatron_hdpo.types.load_report import LoadReport


class HuggingFaceTask(FileTaskBase):
    """A dataset that the `datasets` library loads: a name on the hub, or a local folder."""

    packages: ClassVar[tuple[str, ...]] = ("datasets",)

    kind: Literal["huggingface"]
    dataset: str = Field(description="Name on the hub, a folder of files, or a folder that `save_to_disk` wrote.")
    subset: str | None = Field(None, description="Configuration of the dataset, where it has several.")
    split: str = Field("train", description="Split, slices allowed: train[:95%].")
    revision: str | None = Field(None, description="Commit or tag of the dataset on the hub.")

    def default_name(self) -> str:
        return Path(self.dataset).name

    def source(self) -> str:
        return f"{self.dataset}[{self.split}]"

    def content(self) -> str | None:
        """Return the fingerprint that the library gives the split: it changes with the data."""
        return getattr(self._load(), "_fingerprint", None)

    def rows(self, report: LoadReport) -> Iterator[tuple[str, Any]]:
        """Yield all rows of the split, counted from 1. Raises DataError when the library cannot load it."""
        for number, row in enumerate(self._load(), 1):
            yield f"{self.source()}:{number}", row

    def _load(self) -> Any:
        import datasets

        try:
            if _is_saved(Path(self.dataset)):
                return _saved_split(datasets.load_from_disk(self.dataset), self.split)
            return datasets.load_dataset(self.dataset, self.subset, split=self.split, revision=self.revision)
        except Exception as error:  # the library raises its own, the hub's, pyarrow's and the operating system's errors
            reason = " ".join(str(error).split())
            raise DataError(
                f"task {self.task_name!r}: the datasets library cannot load {self.source()}: "
                f"{type(error).__name__}: {reason}; check dataset, subset and split, and whether the hub can be "
                "reached (`megatron_hdpo prepare` downloads once for offline use)"
            ) from error


def _is_saved(folder: Path) -> bool:
    """Return whether `save_to_disk` wrote this folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _saved_split(loaded: Any, split: str) -> Any:
    """Return a split, or slices of splits, of what `load_from_disk` returned. Raises ValueError for an unknown split.

    A dataset that was saved alone has the split whose name it remembers, else `train`.
    """
    import datasets

    if not isinstance(loaded, datasets.DatasetDict):
        loaded = datasets.DatasetDict({str(loaded.split or "train"): loaded})
    wanted = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(part) for name, part in loaded.items()})
    parts = [loaded[part.splitname].select(range(part.from_, part.to)) for part in wanted]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
