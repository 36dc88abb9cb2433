"""Errors of generation and checking on one rank: each distinct one counted, and logged when it is first seen."""

from __future__ import annotations

import logging
import re
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_hdpo.types.errors import UserError

LOGGER = logging.getLogger(__name__)
MOST_KINDS = 100
"""Distinct errors that are told apart: errors that quote responses must not fill memory and logs."""
_OTHERS = "errors of further kinds"
_LONGEST = 300


class RewardFailed(UserError, RuntimeError):
    """A reward function has failed for a response, and the recipe wants the run to end then."""


@dataclass(frozen=True)
class Failure:
    """A kind of error: the first text of it, and how often it occurred."""

    text: str
    count: int


class Failures:
    """Errors since the last `take`. Texts that differ in numbers only are of one kind. Any thread may add."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._texts: dict[str, str] = {}
        self._lock = threading.Lock()

    def add(self, text: str, problem: str) -> None:
        """Count an error, such as "check failed: KeyError: 'x'". problem: id of the problem it occurred at."""
        text = " ".join(text.split())[:_LONGEST]
        kind = re.sub(r"\d+", "#", text)
        with self._lock:
            if kind not in self._texts and len(self._texts) >= MOST_KINDS:
                kind, text = _OTHERS, _OTHERS
            if kind not in self._texts:
                self._texts[kind] = text
                LOGGER.info("%s (problem %s; from now on errors of this kind are only counted)", text, problem)
            self._counts[kind] += 1

    def take(self) -> list[Failure]:
        """Return the errors since the last call, the most frequent first."""
        with self._lock:
            found = [Failure(self._texts[kind], count) for kind, count in self._counts.most_common()]
            self._counts.clear()
        return found


def most_frequent(of_ranks: Iterable[Iterable[Failure]]) -> str:
    """Return the most frequent error of all ranks with its count; "no error was reported" without any."""
    counts: Counter[str] = Counter()
    for failures in of_ranks:
        for failure in failures:
            counts[failure.text] += failure.count
    if not counts:
        return "no error was reported"
    text, count = counts.most_common(1)[0]
    return f"{text} ({count} x)"
