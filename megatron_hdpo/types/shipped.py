"""Pickles for worker processes that bring the code with them that a user wrote for the recipe.

A file that a recipe names is shipped as it was read at the start: a worker that starts hours later, in the place of one
that was killed, runs the same code. Of a module that workers import themselves the digest is shipped, and a worker
refuses a file that has changed meanwhile.
"""

from __future__ import annotations

import io
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

from megatron_hdpo.types.plugins import FileLoader, PluginError, digest_of, module_of_source

_OURS = __name__.partition(".")[0]
_LEFT_OUT = {_OURS, "__main__", "__mp_main__", "builtins"}


@dataclass(frozen=True)
class _Code:
    """The code of a module. source: to run it from; None for a module that the worker finds and imports itself."""

    module: str
    path: str
    sha256: str
    source: bytes | None


def dumps(value: object) -> bytes:
    """Return a pickle for `loads` in another process of this machine; classes and functions by reference."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(value)
    return pickle.dumps((list(pickler.code.values()), buffer.getvalue()))


def loads(data: bytes) -> Any:
    """Return what `dumps` was given. Raises PluginError when a module's file has changed since then."""
    codes, value = pickle.loads(data)
    for code in codes:
        if code.source is not None:
            module_of_source(code.module, code.path, code.source)
        elif digest_of(Path(code.path).read_bytes()) != code.sha256:
            raise PluginError(f"{code.path} has changed since the run began: start the run again")
    return pickle.loads(value)


class _Pickler(pickle.Pickler):
    """Pickler that notes the modules of all classes and functions that it writes."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.code: dict[str, _Code] = {}

    def reducer_override(self, obj: Any) -> Any:
        """Note the module of a class or function; pickle everything as usual."""
        if isinstance(obj, type | FunctionType) and obj.__module__ is not None:
            self._note(obj.__module__)
        return NotImplemented

    def _note(self, name: str) -> None:
        module = sys.modules.get(name)
        if module is None or name in self.code or name.partition(".")[0] in _LEFT_OUT:
            return
        loader, path = getattr(module.__spec__, "loader", None), getattr(module, "__file__", None)
        if isinstance(loader, FileLoader):
            self.code[name] = _Code(name, loader.path, digest_of(loader.source), loader.source)
        elif path is not None and path.endswith(".py") and Path(path).is_file():
            self.code[name] = _Code(name, path, digest_of(Path(path).read_bytes()), None)
