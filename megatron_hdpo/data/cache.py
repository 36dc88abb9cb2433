"""Cache on disk of checked problems, so that a later start reads them in place of checking them again.

An entry is one Parquet file `<task>-<key>-<digest>.parquet`. The key (`cache_key.py`) stands for everything that
decides the problems. The digest is that of the file's bytes, so that a damaged file is recognised.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout

from megatron_hdpo.data.cache_file import NotStorable, read_problems, write_problems
from megatron_hdpo.data.checked import CheckedProblems

UNUSED_DAYS = 30
"""Days after which an entry that no run has read is removed."""
UNCERTAIN_HOURS = 24
"""Hours for which an entry is used although gold answers took too long to parse: all ranks of a start must agree."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """Where the problems of a task come from: `file` is their entry, None without one; fresh: made just now."""

    file: Path | None
    fresh: bool

    def __str__(self) -> str:
        if self.file is None:
            return "checked at this start, not cached"
        return f"{'checked and cached in' if self.fresh else 'read from the cache'} {self.file}"


class ProblemCache:
    """Entries in a folder that processes of several machines may share. A folder that fails only costs time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, task: str, key: str, make: Callable[[], CheckedProblems]) -> tuple[CheckedProblems, Origin]:
        """Return the entry of `key`; without one, make and store it.

        One process makes an entry, others that want it wait. Errors of `make` are passed on, and nothing is stored.
        """
        stem = f"{re.sub(r'[^A-Za-z0-9_.]+', '_', task)[:60]}-{key}"
        if (found := self._read(stem)) is not None:
            return found
        with self._locked(stem):
            if (found := self._read(stem)) is not None:
                return found
            made = make()
            return made, Origin(self._write(stem, made), fresh=True)

    def _read(self, stem: str) -> tuple[CheckedProblems, Origin] | None:
        try:
            for file in sorted(self.folder.glob(f"{stem}-*.parquet")):
                if _digest(file) != file.stem.rpartition("-")[2]:
                    _logger.warning("the cached problems in %s are damaged: removed, and made again", file)
                elif (entry := read_problems(file)).certain or _age_hours(file) < UNCERTAIN_HOURS:
                    _touch(file, entry.certain)
                    return entry, Origin(file, fresh=False)
                file.unlink(missing_ok=True)
        except OSError as error:
            _logger.warning("the cache of problems %s cannot be read, and is not used: %s", self.folder, error)
        return None

    def _write(self, stem: str, made: CheckedProblems) -> Path | None:
        partial = self.folder / f"{stem}-{uuid4().hex}.partial"
        try:
            write_problems(made, partial)
            entry = self.folder / f"{stem}-{_digest(partial)}.parquet"
            os.replace(partial, entry)
        except (OSError, NotStorable) as error:
            _logger.warning("the problems cannot be cached in %s: %s", self.folder, error)
            return None
        finally:
            with suppress(OSError):
                partial.unlink()
        remove_unused(self.folder)
        return entry

    @contextmanager
    def _locked(self, stem: str) -> Iterator[None]:
        """Hold the entry's lock; where the file system has none, processes may do the same work twice."""
        lock = FileLock(self.folder / f"{stem}.lock")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                _logger.info("waiting for another process that makes %s", stem)
                lock.acquire()
        except (OSError, NotImplementedError) as error:
            _logger.info("no lock in the cache of problems %s: %s", self.folder, error)
        try:
            yield
        finally:
            lock.release()


def remove_unused(folder: Path, days: float = UNUSED_DAYS) -> None:
    """Remove the entries, locks and half-written files that no process has used for so long, and log how many."""
    removed = [size for file in _files(folder) if (size := _removed_size(file, time.time() - days * 86400)) is not None]
    if removed:
        _logger.info(
            "removed %d files (%d bytes) of %s: not used for %g days", len(removed), sum(removed), folder, days
        )


def entries(folder: Path) -> list[Path]:
    """Return the entries in the folder of a cache."""
    return sorted(file for file in _files(folder) if file.suffix == ".parquet")


def _files(folder: Path) -> Iterable[Path]:
    return [file for file in folder.glob("*") if file.suffix in (".parquet", ".lock", ".partial")]


def _removed_size(file: Path, before: float) -> int | None:
    """Remove a file last used before that time and return its size; None for a file that stays."""
    try:
        status = file.stat()
        if status.st_mtime >= before:
            return None
        file.unlink()
        return status.st_size
    except OSError:  # another process has just removed it, or owns it
        return None


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:32]


def _age_hours(file: Path) -> float:
    return (time.time() - file.stat().st_mtime) / 3600


def _touch(file: Path, certain: bool) -> None:
    """Mark an entry as used, unless it has to age; where only others may write, it ages too and is made again."""
    if certain:
        with suppress(OSError):
            os.utime(file)
