r"""Questions with lettered choices, answered by a letter: science sets such as ARC or GPQA, from rows.

The choices become part of the question, in the row's order or shuffled by a seed, so that the position of the right
letter gives nothing away. An answer is right when the box (or, if lenient, its fallback) holds the right letter and
nothing else, or that letter before its own choice: `\boxed{C}`, `(C)`, `**C**`, `Option C`, `C. Argon`,
`\textbf{(C)}\ Argon`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from string import ascii_uppercase
from typing import Any, Literal

from pydantic import Field

from megatron_hdpo.data.tasks.row_source import RowSource
from megatron_hdpo.data.tasks.rows import BadRow, check_text, lookup_or, optional_text, question_key, text_of
from megatron_hdpo.rewards.exact import normalise
from megatron_hdpo.rewards.extraction import AnswerFormat, extract_answer
from megatron_hdpo.types.errors import DataError
from megatron_hdpo.types.load_report import LoadReport
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.task import BadRowPolicy, TaskBase

_SPACE = re.compile(r"\\(?:[ ,;:!]|q?quad(?![A-Za-z]))|~")
_LETTER = re.compile(r"(?:(?:option|choice|answer)\s+)?\(?([a-z])(?:[).:]+|(?=\s|$))\s*(.*)", re.IGNORECASE | re.DOTALL)


class LetterChoiceTask(TaskBase):
    """Choose the right letter."""

    kind: Literal["letter_choice"]
    rows: RowSource = Field(description="Source of the rows.")
    question_key: str = Field("question", description="Key of the question, without its choices.")
    choices_key: str | list[str] = Field(
        "choices",
        description="Key of the choices: a list of texts, texts by letter, or {text: [...], label: [...]}. Or the keys "
        "of one choice each.",
    )
    answer_key: str = Field("answer", description="Key of the right choice.")
    answer_is: Literal["label", "index", "text"] = Field(
        "label",
        description="How the row names the right choice: label (A is the first without labels), index from 0, "
        "or its text.",
    )
    solution_key: str = Field("solution", description="Key of a worked solution; rows may lack it.")
    level_key: str = Field("level", description="Key of the difficulty; rows may lack it.")
    source_key: str | None = Field(
        None, description="Key of where a row comes from, such as subject; rows may lack it. null: not read."
    )
    shuffle_choices: int | None = Field(None, description="Seed that orders each question's choices; null keeps them.")
    answer_format: AnswerFormat = Field("boxed", description="Whether only a box counts as an answer.")
    on_bad_row: BadRowPolicy = Field("error", description="Stop at a row that cannot be used, or drop and count it.")

    def default_name(self) -> str:
        return self.rows.name

    def problems(self, report: LoadReport) -> list[Problem]:
        """Return the rows as problems, in their order, without duplicates, at most `limit`. Raises DataError."""
        problems = list(self._problems(report))
        if not problems:
            raise DataError(f"task {self.task_name!r}: no question is left of its rows")
        return problems

    def content(self) -> str | None:
        return self.rows.content(self.task_name)

    def score(self, problem: Problem, response: str) -> float:
        """Return 1.0 when the final answer is the right letter, alone or before its own choice, else 0.0."""
        answer = extract_answer(response, self.answer_format)
        match = _LETTER.fullmatch(_plain(answer.text)) if answer else None
        if match is None or match.group(1).upper() != problem.answer:
            return 0.0
        return float(match.group(2).strip("* ") in ("", _plain(problem.metadata["right"])))

    def _problems(self, report: LoadReport) -> Iterator[Problem]:
        seen: dict[str, str] = {}
        for where, row in self.rows.rows(self.task_name, self.on_bad_row, report):
            if len(seen) == self.limit:
                return
            try:
                problem = self._problem(row, where)
                key = question_key(lookup_or(row, self.question_key) + "".join(sorted(problem.metadata["choices"])))
                if key in seen:
                    raise BadRow("duplicate question", f"has the same question and choices as {seen[key]}")
            except BadRow as bad:
                report.reject(self.task_name, self.on_bad_row, bad.reason, f"{where}: {bad}")
                continue
            seen[key] = where
            yield problem

    def _problem(self, row: Any, where: str) -> Problem:
        question = lookup_or(row, self.question_key)
        if not isinstance(question, str) or not question.strip():
            raise BadRow("no question", f"has no text at {self.question_key!r}")
        labels, texts = self._choices(row)
        right = self._right(row, labels, texts)
        index = where.rpartition(":")[2]
        order = list(range(len(texts)))
        if self.shuffle_choices is not None:
            random.Random(f"{self.shuffle_choices}/{index}").shuffle(order)
        choices = [texts[i] for i in order]
        lines = "\n".join(f"{letter}. {text}" for letter, text in zip(ascii_uppercase, choices, strict=False))
        level = optional_text(row, self.level_key, "level")
        solution = optional_text(row, self.solution_key, "solution")
        source = optional_text(row, self.source_key, "source") if self.source_key else None
        check_text(question, lines, solution or "", level or "", source or "")
        answer = ascii_uppercase[order.index(right)]
        return Problem(
            id=f"{self.task_name}/{index}",
            task=self.task_name,
            question=f"{question.strip()}\n\n{lines}",
            answer=answer,
            solution=f"{solution}\n\\boxed{{{answer}}}" if solution else None,
            level=level,
            source=source,
            metadata={"source": where, "choices": choices, "right": texts[right]},
        )

    def _choices(self, row: Any) -> tuple[list[str], list[str]]:
        """Return labels and texts of the row's choices. Raises BadRow."""
        if isinstance(self.choices_key, list):
            value: Any = [lookup_or(row, key) for key in self.choices_key]
        else:
            value = lookup_or(row, self.choices_key)
        labels, texts = _labelled(value)
        if not 2 <= len(texts) <= len(ascii_uppercase) or len(labels) != len(texts):
            raise BadRow("bad choices", f"the choices at {self.choices_key!r} are {str(value)[:80]}: not 2 to 26 texts")
        texts = [text_of(text, str(self.choices_key), "choice").strip() for text in texts]
        if not all(texts):
            raise BadRow("bad choices", f"the choices at {self.choices_key!r} are not all texts: {str(value)[:80]}")
        if len({normalise(text) for text in texts}) < len(texts):
            raise BadRow("equal choices", f"two of the choices are the same: {str(texts)[:80]}")
        return [str(label).strip() for label in labels], texts

    def _right(self, row: Any, labels: Sequence[str], texts: Sequence[str]) -> int:
        named = text_of(lookup_or(row, self.answer_key, ""), self.answer_key, "answer").strip()
        among = {"label": labels, "text": texts, "index": [str(i) for i in range(len(texts))]}[self.answer_is]
        if named not in among:
            raise BadRow(
                "answer is no choice",
                f"the answer at {self.answer_key!r} is {named[:80]!r}; as {self.answer_is} it must be one of "
                f"{', '.join(among)[:200]}",
            )
        return list(among).index(named)


def _plain(text: str) -> str:
    """Return the text as `normalise` does, without LaTeX spaces and without bold marks around the whole."""
    return normalise(_SPACE.sub(" ", text).strip("* "))


def _labelled(value: Any) -> tuple[list[Any], list[Any]]:
    """Return labels and texts for each form of choices; ([], []) for anything else."""
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):
        texts = value["text"]
        return list(value.get("label") or ascii_uppercase[: len(texts)]), texts
    if isinstance(value, Mapping):
        return list(value.keys()), list(value.values())
    return (list(ascii_uppercase[: len(value)]), value) if isinstance(value, list) else ([], [])
