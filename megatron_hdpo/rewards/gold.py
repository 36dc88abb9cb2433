"""Check of gold answers before any GPU time is spent: parsed once, in the pool's workers, with a cache on disk."""

from __future__ import annotations

import hashlib
import logging
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

_logger = logging.getLogger(__name__)

_PLAIN_NUMBER = re.compile(r"-?\d{1,300}(?:\.\d{1,300})?")
_LONGEST_ANSWER = 4096

JUDGES = ("math-verify", "latex2sympy2-extended", "sympy", "antlr4-python3-runtime")
"""Packages that read and compare answers: another version may give another verdict."""


@dataclass(frozen=True)
class GoldVerdict:
    """The result of parsing a gold answer.

    error: why it cannot be parsed, None when it can. certain: whether another try would give the same result.
    """

    error: str | None
    certain: bool = True


GoldChecker = Callable[[Sequence[str]], Sequence[GoldVerdict]]


class GoldCache:
    """Verdicts in an SQLite file, one for each state of the rules. A file that cannot be used only causes a warning."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / f"gold-{rules_digest()}.sqlite"

    def read(self, answers: Iterable[str]) -> dict[str, GoldVerdict]:
        """Return the verdicts that the file has."""
        query = "SELECT error FROM gold WHERE answer = ?"
        try:
            with self._open() as connection:
                rows = {answer: connection.execute(query, (answer,)).fetchone() for answer in answers}
        except (OSError, sqlite3.Error) as error:
            _logger.warning("cannot read the cache of parsed gold answers %s: %s", self._path, error)
            return {}
        return {answer: GoldVerdict(row[0]) for answer, row in rows.items() if row is not None}

    def write(self, verdicts: Mapping[str, GoldVerdict]) -> None:
        """Store the verdicts that are certain."""
        rows = [(answer, verdict.error) for answer, verdict in verdicts.items() if verdict.certain]
        try:
            with self._open() as connection:
                connection.executemany("INSERT OR REPLACE INTO gold VALUES (?, ?)", rows)
        except (OSError, sqlite3.Error) as error:
            _logger.warning("cannot write the cache of parsed gold answers %s: %s", self._path, error)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self._path, timeout=30)) as connection, connection:
            connection.execute("CREATE TABLE IF NOT EXISTS gold (answer TEXT PRIMARY KEY, error TEXT)")
            yield connection


@lru_cache(maxsize=1)
def rules_digest() -> str:
    """Return the digest of what decides on answers: the code of this room, and the versions of `JUDGES`."""
    digest = hashlib.sha256(" ".join(f"{name}={version(name)}" for name in JUDGES).encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:32]


def check_golds(answers: Iterable[str], checker: GoldChecker, cache: GoldCache | None = None) -> dict[str, GoldVerdict]:
    """Return a verdict for every answer; `checker` parses those that are neither plain numbers nor cached."""
    verdicts = {answer: _obvious(answer) for answer in answers}
    unknown = [answer for answer, verdict in verdicts.items() if verdict is None]
    found = cache.read(unknown) if cache and unknown else {}
    rest = [answer for answer in unknown if answer not in found]
    if rest:
        new = dict(zip(rest, checker(rest), strict=True))
        if cache:
            cache.write(new)
        found |= new
    return {answer: verdict or found[answer] for answer, verdict in verdicts.items()}


def _obvious(answer: str) -> GoldVerdict | None:
    if _PLAIN_NUMBER.fullmatch(answer):
        return GoldVerdict(None)
    if len(answer) > _LONGEST_ANSWER:
        return GoldVerdict(f"gold answer of {len(answer)} characters: a final answer has at most {_LONGEST_ANSWER}")
    return None
