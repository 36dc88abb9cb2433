"""Reading of Megatron's distributed checkpoints without running code that somebody may have put into them.

torch's reader unpickles a folder's `.metadata`, and objects among the tensors, without any restriction: a folder from
elsewhere could do everything that its reader may.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.serialization import safe_globals

from megatron_hdpo.parallel.variables import variable_set
from megatron_hdpo.weights.errors import WeightsError

_METADATA = ".metadata"
_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner")
"""Modules of plain data classes and enumerations, which do nothing when they are made."""
_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("collections", "OrderedDict"),
}
_PLAIN_DATA_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_REFUSED = re.compile(r"unsupported (?:global: )?GLOBAL (\S+)", re.IGNORECASE)
_OPTIMIZERS = (
    ("torch.optim.adam", "Adam"),
    ("torch.optim.adamw", "AdamW"),
    ("torch.optim.sgd", "SGD"),
    ("transformer_engine.pytorch.optimizers.fused_adam", "FusedAdam"),
    ("transformer_engine.pytorch.optimizers.fused_sgd", "FusedSGD"),
    ("apex.optimizers.fused_adam", "FusedAdam"),
    ("apex.optimizers.fused_sgd", "FusedSGD"),
)
"""Classes that the state of an optimizer with a share on the host names."""


class UnsafeFileError(WeightsError):
    """A checkpoint that would run code when it is read; the message names the file and the code."""


def read_sharded(sharded: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Return a sharded state with the contents of a checkpoint. Collective.

    Raises UnsafeFileError, and what torch and Megatron raise of files that are damaged.
    """
    check_metadata(Path(path))
    try:
        with _plain_data_only(), safe_globals(_harmless_classes()):
            return dist_checkpointing.load(sharded, str(path))
    except (Exception, CheckpointException) as error:
        if (refused := _REFUSED.search(str(error))) is None:
            raise
        raise UnsafeFileError(
            f"{path} holds an object of {refused[1]}, which is no plain data and could run code: it is not read. If "
            f"you trust who wrote it, set {_PLAIN_DATA_ONLY}=0"
        ) from error


def read_tensors(path: str | Path) -> dict[str, ShardedTensor]:
    """Return name, shape and type of the tensors in a checkpoint; raises as `read_sharded` does."""
    check_metadata(Path(path))
    return dist_checkpointing.load_tensors_metadata(str(path))


def check_metadata(folder: Path) -> None:
    """Raise UnsafeFileError if the description of a checkpoint holds more than torch writes there."""
    path = folder / _METADATA
    if not path.is_file():
        return  # Megatron's own error says what is missing
    with path.open("rb") as file:
        _Unpickler(file, path).load()


class _Unpickler(pickle.Unpickler):
    """Unpickler that makes nothing but torch's descriptions of tensors and files."""

    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        found = None
        if "." not in name:  # `Class.method.__globals__` would reach everything
            if module in _MODULES or (module, name) in _NAMES:
                found = super().find_class(module, name)
            elif module == "torch":
                found = getattr(torch, name, None)
                found = found if isinstance(found, torch.dtype) else None
        if found is None or (module in _MODULES and getattr(found, "__module__", None) != module):
            raise UnsafeFileError(
                f"{self._path} refers to {module}.{name}, which no description of a checkpoint needs and which could "
                "run code: it is not read. Take the checkpoint from a source that you trust, or write it anew"
            )
        return found


def _harmless_classes() -> list[Any]:
    """Return classes that checkpoints name, of packages that are loaded; to make one does nothing."""
    loaded = [(sys.modules[module], name) for module, name in _OPTIMIZERS if module in sys.modules]
    return [io.BytesIO, *(getattr(module, name) for module, name in loaded if hasattr(module, name))]


def _plain_data_only() -> AbstractContextManager[None]:
    """Make every `torch.load` refuse all but tensors and plain data, unless the user has set its variable to 0.

    torch's reader itself asks for less care with objects.
    """
    return variable_set(_PLAIN_DATA_ONLY, "0" if os.environ.get(_PLAIN_DATA_ONLY) == "0" else "1")
