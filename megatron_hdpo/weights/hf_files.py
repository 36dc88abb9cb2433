"""Reader of a Hugging Face folder's safetensors, one slice at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_hdpo.weights.errors import WeightsError, listed
from megatron_hdpo.weights.fused import Part, parts_of
from megatron_hdpo.weights.mapping import HfTensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_IGNORED_SUFFIX = "rotary_emb.inv_freq"
"""Name of a buffer in old exports; it follows from the configuration."""


class HfWeights:
    """The tensors of one Hugging Face folder, a single file or shards with an index; use it as a context manager.

    Experts that are stored in one tensor for the whole layer have the names and shapes of single experts here. Files
    are memory-mapped: only the slices that are used are read. Entering raises WeightsError on a folder without
    safetensors, a shard that is missing or damaged, and an index that names a tensor which its shard lacks.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._stack = ExitStack()
        self._file_of: dict[str, Any] = {}
        self._parts: dict[str, Part] = {}

    def __enter__(self) -> HfWeights:
        try:
            for file, names in self._files().items():
                self._open(file, names)
            self._split_experts()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def names(self) -> list[str]:
        """Names of all tensors, without buffers that follow from the configuration."""
        split = {part.stored for part in self._parts.values()}
        stored = (name for name in self._file_of if not name.endswith(_IGNORED_SUFFIX) and name not in split)
        return [*stored, *self._parts]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the full shape of a tensor."""
        return self._parts[name].shape if name in self._parts else tuple(self._stored(name).get_shape())

    def dtype(self, name: str) -> str:
        """Return the file's name for a tensor's type, such as BF16."""
        return self._stored(name).get_dtype()

    def read(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """Read rows (dim 0) or columns (dim 1) start:stop of a tensor to the CPU, in the file's type."""
        view = self._stored(name)
        if name in self._parts:
            return view[self._parts[name].index(dim, start, stop)]
        return view[start:stop] if dim == 0 else view[:, start:stop]

    def mismatches(self, expected: Iterable[HfTensor], optional: Iterable[str] = ()) -> list[str]:
        """List, as lines of text, tensors that are missing, unexpected, of a wrong shape or not of a float type.

        optional: names that may be there without being expected.
        """
        shapes = {tensor.name: tensor.shape for tensor in expected}
        present = set(self.names)
        both = [name for name in shapes if name in present]
        wrong = [
            f"{name}: {self.shape(name)}, expected {shapes[name]}{self._origin(name)}"
            for name in both
            if self.shape(name) != shapes[name]
        ]
        foreign = [f"{name}: {self.dtype(name)}" for name in both if self.dtype(name) not in DTYPES]
        return [
            *listed("missing", (name for name in shapes if name not in present)),
            *listed("unexpected", sorted(present - shapes.keys() - set(optional))),
            *listed("of a wrong shape", wrong),
            *listed(f"of a type that is not one of {', '.join(DTYPES)} (quantised?)", foreign),
        ]

    def _files(self) -> dict[Path, list[str] | None]:
        """Return the shards with the names that the index gives them (None: all names inside)."""
        index, single = self.path / INDEX_FILE, self.path / SINGLE_FILE
        if not index.is_file():
            if not single.is_file():
                raise WeightsError(f"{self.path} holds neither {SINGLE_FILE} nor {INDEX_FILE}: no weights to read")
            return {single: None}
        files: dict[Path, list[str] | None] = {}
        for name, file in _weight_map(index).items():
            names = files.setdefault(self.path / file, [])
            assert names is not None
            names.append(name)
        if single.exists() and single not in files:
            raise WeightsError(
                f"{self.path} holds {SINGLE_FILE}, and {INDEX_FILE} names other files: programs read the one or the "
                "other; remove the one that is not meant"
            )
        return files

    def _stored(self, name: str) -> Any:
        """Return the slices of the stored tensor that is, or holds, a tensor."""
        stored = self._parts[name].stored if name in self._parts else name
        return self._file_of[stored].get_slice(stored)

    def _origin(self, name: str) -> str:
        """Return where a tensor lies, for a message; nothing for one that is stored by itself."""
        if name not in self._parts:
            return ""
        stored = self._parts[name].stored
        return f" (a part of {stored}, which is {tuple(self._file_of[stored].get_slice(stored).get_shape())})"

    def _split_experts(self) -> None:
        """Add the tensors of single experts. Raises WeightsError for an expert that is there in both forms."""
        for stored in self._file_of:
            self._parts |= parts_of(stored, self.shape(stored))
        if twice := next((name for name in self._parts if name in self._file_of), None):
            raise WeightsError(
                f"{self.path} holds {twice} by itself and in {self._parts[twice].stored}: remove the one that is not "
                "meant"
            )

    def _open(self, file: Path, names: list[str] | None) -> None:
        try:
            handle = self._stack.enter_context(safe_open(file, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{file} cannot be read ({error}): download the checkpoint again") from error
        inside = set(handle.keys())
        absent = [name for name in names or () if name not in inside]
        if absent:
            raise WeightsError("\n".join([f"{self.path / INDEX_FILE}", *listed(f"not in {file.name}", absent)]))
        self._file_of.update(dict.fromkeys(inside if names is None else names, handle))


def _weight_map(index: Path) -> dict[str, str]:
    """Return the file of each tensor. Raises WeightsError for an index that does not say it."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{index} is not JSON ({error}): download the checkpoint again") from error
    except OSError as error:
        raise WeightsError(f"{index} cannot be read: {error.strerror}") from error
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise WeightsError(f"{index} has no weight_map from tensors to files: download the checkpoint again")
    if (outside := next((file for file in files.values() if _leaves_the_folder(file)), None)) is not None:
        raise WeightsError(f"{index} names the file {outside!r}, which is not in this folder: it is not read")
    return files


def _leaves_the_folder(file: str) -> bool:
    return not file or Path(file).is_absolute() or ".." in Path(file).parts
