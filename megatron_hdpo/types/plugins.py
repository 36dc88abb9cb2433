"""Objects that a recipe names and this package does not hold: a user's objectives, tasks and functions.

A reference is `package.module:Name`, `path/to/file.py:Name`, or the name of an entry point that an installed package
declares. Relative paths start at the working directory, as all paths of a recipe do. A file becomes a module whose name
comes from its path and its content, so the same file is the same module, and an edited one is another.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.abc import InspectLoader
from importlib.metadata import EntryPoint, entry_points
from importlib.util import decode_source, module_from_spec, spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from megatron_hdpo.types.errors import UserError

FORMS = "module:Name or path/to/file.py:Name"
"""The two forms of a reference that need no installed package, for messages."""
_LONGEST_REASON = 500
_ABSENT = object()


class PluginError(UserError, ValueError):
    """A reference that names nothing usable; the text says which, why, and what to do."""


@dataclass(frozen=True)
class LoadedReference:
    """An object and the source file that defines it.

    reference: as the recipe has it. value: the class or function. file, sha256, source: its source file, the digest of
    its content, and the content; None, "" and b"" for an object without a source file. Of a reference by module, the
    file is the one that defines the object, wherever the module has it from.
    """

    reference: str
    value: Any
    file: Path | None = None
    sha256: str = ""
    source: bytes = field(default=b"", repr=False)


class FileLoader(InspectLoader):
    """Import of one file's content as it was read: an edit later in the run changes nothing, in no process."""

    def __init__(self, path: str, source: bytes) -> None:
        self.path, self.source = path, source

    def get_source(self, fullname: str) -> str:
        """Return the text, for tracebacks and `inspect`."""
        return decode_source(self.source)

    def get_code(self, fullname: str) -> CodeType:
        """Return the compiled file."""
        return compile(self.source, self.path, "exec", dont_inherit=True)


def is_reference(text: str) -> bool:
    """Return whether a text has the form of a reference, not of a plain name."""
    return ":" in text


def load_reference(reference: str, group: str) -> LoadedReference:
    """Return the object that a reference names. Runs the code of its module; imports it once per process.

    group: of entry points, for a reference without a colon. Raises PluginError, in one line, for a module, file, name
    or entry point that is not there, an entry point of two packages, and an import that fails.
    """
    if not is_reference(reference):
        return _of_entry_point(reference, group)
    where, _, name = reference.rpartition(":")
    if not name.isidentifier():
        raise PluginError(f"{_shown(reference)}: after the colon stands the name of a class or function")
    if not where.endswith(".py"):
        value = _member(_imported(where), name, where)
        file = _source_file(sys.modules.get(getattr(value, "__module__", None) or where) or sys.modules[where])
        source = b"" if file is None else file.read_bytes()
        return LoadedReference(reference, value, file, digest_of(source) if file else "", source)
    file, source = _read(where)
    return LoadedReference(reference, _member(_of_file(file, source), name, where), file, digest_of(source), source)


def entry_point_names(group: str) -> list[str]:
    """Return the names that installed packages declare in a group of entry points, in alphabetical order."""
    return sorted({entry.name for entry in entry_points(group=group)})


def module_of_source(name: str, path: str, source: bytes) -> ModuleType:
    """Return the module `name` with this source, imported once per process. Raises what the source raises."""
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, path, loader=FileLoader(path, source))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and type hints look there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def digest_of(source: bytes) -> str:
    """Return the sha256 of a source file's content, in hexadecimal."""
    return hashlib.sha256(source).hexdigest()


def _of_file(file: Path, source: bytes) -> ModuleType:
    key = hashlib.sha256(f"{file}\n".encode("utf-8", "surrogateescape") + source).hexdigest()[:12]
    name = f"recipe_file_{re.sub(r'[^0-9A-Za-z_]', '_', file.stem)}_{key}"
    try:
        return module_of_source(name, str(file), source)
    except (Exception, SystemExit) as error:
        raise _failed(str(file), error) from error


def _read(path: str) -> tuple[Path, bytes]:
    try:
        file = Path(path).resolve()
        return file, file.read_bytes()
    except FileNotFoundError as error:
        at = "" if Path(path).is_absolute() else f" in the working directory {Path.cwd()}"
        raise PluginError(f"there is no file {_shown(path)}{at}") from error
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of links
        reason = getattr(error, "strerror", None) or str(error)
        raise PluginError(f"{_shown(path)} cannot be read: {reason}") from error


def _imported(module: str) -> ModuleType:
    if not all(part.isidentifier() for part in module.split(".")):
        raise PluginError(f"{_shown(module)} is neither a module (package.module) nor a file (its name ends in .py)")
    _search_in_working_directory()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise _failed(module, error) from error
        raise PluginError(
            f"there is no module {error.name}: install its package, put its folder into PYTHONPATH, or name its file "
            "(path/to/file.py:Name)"
        ) from error
    except (Exception, SystemExit) as error:
        raise _failed(module, error) from error


def _search_in_working_directory() -> None:
    """Let modules of the working directory be found by the command `megatron_hdpo` too, as `python -m` does."""
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())


def _member(module: ModuleType, name: str, where: str) -> Any:
    value = getattr(module, name, _ABSENT)
    if value is not _ABSENT:
        return value
    known = [other for other in vars(module) if not other.startswith("_")]
    own = [other for other in known if getattr(vars(module)[other], "__module__", None) == module.__name__]
    raise PluginError(f"{_shown(where)} has no {name}{near(name, known) or _all_of(own)}")


def _of_entry_point(name: str, group: str) -> LoadedReference:
    found = {(_package(entry), entry.value): entry for entry in entry_points(group=group) if entry.name == name}
    if not found:
        known = entry_point_names(group)
        raise PluginError(f"no installed package has an entry point {_shown(name)} in {group}{near(name, known)}")
    if len(found) > 1:
        packages = " and ".join(sorted(package for package, _ in found))
        raise PluginError(f"the packages {packages} both have an entry point {name} in {group}: name module:Name")
    ((package, target),) = found
    try:
        loaded = load_reference(target.partition("[")[0].strip(), group) if is_reference(target) else None
    except PluginError as error:
        raise PluginError(f"entry point {name} of {package}: {error}") from error
    if loaded is None:
        raise PluginError(f"entry point {name} of {package} is {target}: it must be module:Name")
    return LoadedReference(name, loaded.value, loaded.file, loaded.sha256, loaded.source)


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "?"


def _source_file(module: ModuleType) -> Path | None:
    try:
        found = inspect.getsourcefile(module)
    except TypeError:  # a module that is built into the interpreter
        return None
    return Path(found).resolve() if found and Path(found).is_file() else None


def _failed(where: str, error: BaseException) -> PluginError:
    """Return the error of an import that raises: type and message, file and line."""
    if isinstance(error, SyntaxError) and error.filename:
        file, line, reason = error.filename, error.lineno, error.msg
    else:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_machinery(frame.filename)]
        file, line = (frames[-1].filename, frames[-1].lineno) if frames else (where, None)
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
    place = f"{file}, line {line}" if line else file
    return PluginError(f"{_shown(where)} cannot be imported: {type(error).__name__}: {reason} ({place})")


def _is_machinery(file: str) -> bool:
    return file.startswith("<frozen") or file == __file__ or file == importlib.__file__


def near(word: str, known: Sequence[str]) -> str:
    """Return the end of a message about an unknown name: the known ones that are close to it; "" without any."""
    close = difflib.get_close_matches(word, known, n=2)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _all_of(names: Sequence[str]) -> str:
    return f"; it defines {', '.join(names[:10])}" if names else "; it defines nothing"


def _shown(text: str) -> str:
    return text if text.isprintable() and len(text) <= 200 else ascii(text[:200])
