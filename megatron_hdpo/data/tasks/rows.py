"""Conversion of one row of a file to one problem, or to the reason why it cannot be one."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_hdpo.data.tasks.values import NoText, as_text, is_missing, stands_for_missing
from megatron_hdpo.rewards.extraction import last_boxed
from megatron_hdpo.types.problem import Problem

_MISSING = object()
_LIST_OF_TEXTS = re.compile(r"\[\s*[\"']")
_NOT_PART_OF_A_QUESTION = re.compile(r"\s|\$|\\[,;! ]|\\left|\\right")


class BadRow(ValueError):
    """A row that cannot be used.

    reason: short, for counting. The message says what is wrong with this row.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class RowKeys:
    """The keys at which a row holds its parts; see the recipe's keys of the same names."""

    question: str
    answer: str | None
    solution: str
    level: str
    source: str | None = None
    answer_pattern: str | None = None


class RowReader:
    """Reader that makes problems of the rows of one task.

    expressions: whether answers are mathematics, so that `None` or `inf` are texts of programs and no
    answers, and a list of one text, `["18"]`, is that text.
    """

    def __init__(self, task: str, keys: RowKeys, expressions: bool = True) -> None:
        self.task, self.keys, self.expressions = task, keys, expressions

    def selected(self, row: Any, wanted: Mapping[str, Sequence[Any]]) -> bool:
        """Return whether the row's value at every key of `wanted` is one of the listed ones."""
        return all(self._required(row, key) in values for key, values in wanted.items())

    def problem(self, row: Any, where: str) -> Problem:
        """Return the row as a problem; `where` (file:line) becomes part of its id. Raises BadRow."""
        question = self._text(row, self.keys.question, "question")
        solution = optional_text(row, self.keys.solution, "solution")
        answer = self._answer(row, solution)
        if self.expressions:
            answer = _unpacked(answer)
        level = optional_text(row, self.keys.level, "level")
        source = optional_text(row, self.keys.source, "source") if self.keys.source else None
        check_text(question, answer, solution or "", level or "", source or "")
        return Problem(
            id=f"{self.task}/{where.rpartition(':')[2]}",
            task=self.task,
            question=question,
            answer=answer,
            solution=ending_in_answer(solution, answer),
            level=level,
            source=source,
            metadata={"source": where},
        )

    def _answer(self, row: Any, solution: str | None) -> str:
        if self.keys.answer is None:
            boxed = last_boxed(solution or "")
            if not boxed or not boxed.strip():
                raise BadRow("no box in solution", "has no \\boxed{} answer in its solution, and answer_key is null")
            return boxed.strip()
        text = self._text(row, self.keys.answer, "answer")
        if self.expressions and stands_for_missing(text):
            raise BadRow("no answer", f"the answer at {self.keys.answer!r} is {text!r}, which is no value")
        if self.keys.answer_pattern is None:
            return text
        matches = [match.group(1) for match in re.finditer(self.keys.answer_pattern, text)]
        if not matches or not (matches[-1] or "").strip():
            raise BadRow("answer_pattern not found", f"answer_pattern finds nothing in the answer {text[:80]!r}")
        return matches[-1].strip()

    def _text(self, row: Any, key: str, what: str) -> str:
        value = self._required(row, key)
        text = text_of(value, key, what)
        if not text.strip():
            raise BadRow(f"empty {what}", f"the {what} at {key!r} is empty")
        return text.strip()

    def _required(self, row: Any, key: str) -> Any:
        value = lookup(row, key)
        if value is _MISSING:
            has = ", ".join(sorted(map(str, row))) if isinstance(row, Mapping) else type(row).__name__
            raise BadRow("missing key", f"has no key {key!r} (it has: {has})")
        return value


def optional_text(row: Any, key: str, what: str) -> str | None:
    """Return a text that rows may lack: null, the NaN that pandas writes for null, and blanks are none.

    Raises BadRow for a list or an object, and for a text such as `nan` or `None` that a program wrote for nothing.
    """
    value = lookup(row, key)
    text = None if value is _MISSING or is_missing(value) else text_of(value, key, what).strip()
    if text and stands_for_missing(text):
        raise BadRow(f"no {what}", f"the {what} at {key!r} is {text!r}, which is no value: leave the key out, or null")
    return text or None


def text_of(value: Any, key: str, what: str) -> str:
    """Return the value of a row as a text. Raises BadRow for what is neither a text nor a finite number."""
    try:
        return as_text(value)
    except NoText as error:
        raise BadRow(f"{what} is no text", f"the {what} at {key!r} is {error}") from error


def check_text(*texts: str) -> None:
    """Raise BadRow for a text that no tokenizer can encode: half a surrogate pair, or bytes that were not UTF-8."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = repr(text[max(0, error.start - 20) : error.start + 20])
            raise BadRow("not Unicode", f"holds bytes that are not UTF-8 text, around {found}") from error


def lookup(row: Any, key: str) -> Any:
    """Return the value at a key, or at a path of keys and list indices joined by dots; else `_MISSING`."""
    if isinstance(row, Mapping) and key in row:
        return row[key]
    for part in key.split("."):
        if isinstance(row, Mapping) and part in row:
            row = row[part]
        elif isinstance(row, list) and part.isdigit() and int(part) < len(row):
            row = row[int(part)]
        else:
            return _MISSING
    return row


def lookup_or(row: Any, key: str, default: Any = None) -> Any:
    """Return the value as `lookup` does, `default` when there is none."""
    value = lookup(row, key)
    return default if value is _MISSING else value


def ending_in_answer(solution: str | None, answer: str) -> str | None:
    """Return the solution with its answer in a box at the end, added where it has no box.

    Students learn from these solutions that a response ends in a box.
    """
    if solution is None or last_boxed(solution) is not None:
        return solution
    return f"{solution}\n\\boxed{{{answer}}}"


def question_key(question: str) -> str:
    """Return a key that is equal for questions which differ only in case, spacing, dollar signs or LaTeX spacing."""
    return _NOT_PART_OF_A_QUESTION.sub("", unicodedata.normalize("NFKC", question)).casefold().rstrip(".")


def _unpacked(answer: str) -> str:
    """Return the only text of a list of texts; any other answer, an interval too, as it is. Raises BadRow.

    A list of several answers does not say whether all of them or any of them is asked for.
    """
    if not _LIST_OF_TEXTS.match(answer):
        return answer
    try:
        items = json.loads(answer)
    except ValueError:
        items = None
    if isinstance(items, list) and len(items) == 1 and isinstance(items[0], str) and items[0].strip():
        return items[0].strip()
    raise BadRow(
        "answer is a list", f"has a list as its answer, {answer[:80]!r}: write one answer, or one list of one text"
    )
