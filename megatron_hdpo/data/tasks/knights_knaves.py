r"""Knights and knaves puzzles: decide from their statements which people always tell the truth and which always lie.

Puzzles are generated here, or read from rows. They differ from reasoning-gym's of the same name: its scorer gives
partial points for some of the people and reads sentences. Here an answer is right when the last box names everybody
once with the right role and nobody else (the grading of arXiv 2606.11709): `\boxed{Ann is a knight, Bob is a knave}`.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_hdpo.data.tasks.knights_logic import Statement, draw_statements, holds, in_words, violated
from megatron_hdpo.data.tasks.row_source import RowSource
from megatron_hdpo.data.tasks.rows import BadRow, check_text, ending_in_answer, lookup_or, optional_text
from megatron_hdpo.rewards.extraction import last_boxed, visible_text
from megatron_hdpo.types.errors import DataError
from megatron_hdpo.types.load_report import LoadReport
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.task import BadRowPolicy, TaskBase

_NAMES = (
    "Ada Alba Amos Anton Bela Boris Bruno Carla Cleo Conrad Dana Dora Edgar Elsa Emil Enzo Esther Felix Flora Greta "
    "Gustav Hanna Hugo Ida Igor Irma Ivan Jonas Judith Julia Karl Klara Lena Leo Lotte Magda Marta Max Mira Nils Nora "
    "Olga Oskar Otto Paula Petra Rita Rosa Selma Simon Tilda Viktor Wanda"
)
NAMES = _NAMES.split()
PHRASINGS = (
    '{name} says: "{claim}."',
    '{name} claims: "{claim}."',
    '"{claim}," says {name}.',
    '"{claim}," {name} tells you.',
    "{name} lets you know that {clause}.",
    "{name} swears that {clause}.",
    "If you ask {name}, {clause}.",
    'You hear {name} say: "{claim}."',
    '{name} adds: "{claim}."',
    "It is {name}'s word that {clause}.",
)
_ROLE = re.compile(
    r"(?<![\w'-])([^\W\d_][\w'-]*)\s*(?:=|:|\bis\b(?:\s+an?\b)?)\s*(?:an?\s+)?(knight|knave)\b", re.IGNORECASE
)
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
_DRAWS_PER_PROBLEM = 20


class KnightsKnavesTask(TaskBase):
    """Find every person's role; their number is the level."""

    kind: Literal["knights_knaves"]
    people: list[int] = Field(default_factory=lambda: [4], min_length=1, description="Numbers of people, in turn.")
    size: int = Field(500, ge=1, description="Number of different puzzles, all numbers of people together.")
    seed: int = Field(0, description="Seed of the puzzles.")
    rows: RowSource | None = Field(
        None,
        description="Read puzzles from rows in place of generating them; keys: problem, names, roles, optionally "
        "statements and solution.",
    )
    on_bad_row: BadRowPolicy = Field("error", description="Stop at a row that cannot be used, or drop and count it.")

    @model_validator(mode="after")
    def _sizes(self) -> KnightsKnavesTask:
        if min(self.people) < 2 or max(self.people) > min(len(NAMES), 14):
            raise ValueError(f"people holds {self.people}: puzzles have 2 to 14 people")
        return self

    def default_name(self) -> str:
        return self.rows.name if self.rows else "knights_knaves"

    def problems(self, report: LoadReport) -> list[Problem]:
        """Return different puzzles, each with one solution. Raises DataError for rows that cannot be used."""
        found: dict[str, Problem] = {}
        for problem in self._read(report) if self.rows else self._drawn():
            found.setdefault(problem.question, problem)
            if len(found) == self.limit:
                break
        if not found:
            raise DataError(f"task {self.task_name!r}: no puzzle is left of its rows")
        return list(found.values())

    def score(self, problem: Problem, response: str) -> float:
        """Return 1.0 when the last box gives everybody's role and all of them are right, else 0.0."""
        return float(_roles_in(last_boxed(visible_text(response))) == _gold(problem))

    def feedback(self, problem: Problem, response: str) -> str | None:
        """Return which people are missing or unknown, else whose statements the answer contradicts.

        None for a right answer.
        """
        said, gold = _roles_in(last_boxed(visible_text(response))), _gold(problem)
        if said == gold:
            return None
        if not said:
            return "The response gives no role in \\boxed{}."
        names: list[str] = problem.metadata["names"]
        if missing := [name for name in names if name.casefold() not in said]:
            return f"The answer says nothing of {', '.join(missing)}."
        if strangers := sorted(said.keys() - gold.keys()):
            return f"The answer names {', '.join(strangers)}, and there is nobody called so."
        roles = [said[name.casefold()] for name in names]
        wrong = violated(problem.metadata["statements"], roles) if problem.metadata["statements"] else []
        return " ".join(_contradiction(names[i], roles[i]) for i in wrong) or "The roles in the answer are not right."

    def _drawn(self) -> Iterator[Problem]:
        rng = random.Random(f"knights_knaves/{self.seed}")
        questions: set[str] = set()
        count = min(self.size, self.limit or self.size)
        for _ in range(count * _DRAWS_PER_PROBLEM):
            if len(questions) == count:
                return
            people = self.people[len(questions) % len(self.people)]
            problem = self._puzzle(len(questions), *draw_statements(people, rng), rng)
            if problem.question not in questions:
                questions.add(problem.question)
                yield problem
        raise DataError(
            f"task {self.task_name!r}: only {len(questions)} different puzzles found for size {count}; lower size"
        )

    def _puzzle(
        self, index: int, statements: Sequence[Statement], roles: Sequence[bool], rng: random.Random
    ) -> Problem:
        names = rng.sample(NAMES, len(roles))
        said = [_sentence(rng.choice(PHRASINGS), name, s, names) for name, s in zip(names, statements, strict=True)]
        question = (
            "Everybody on an island is a knight or a knave: a knight says nothing but what is true, a knave nothing "
            f"but what is false. You meet {len(names)} people there: {', '.join(names[:-1])} and {names[-1]}. "
            f"{' '.join(said)} Who is a knight, and who is a knave?"
        )
        checks = [
            f"{name} is a {_role(role)}: what {name} says is {'true' if holds(statement, roles) else 'false'}."
            for name, role, statement in zip(names, roles, statements, strict=True)
        ]
        return self._problem(
            index=str(index),
            question=question,
            names=names,
            roles=roles,
            statements=list(statements),
            solution="\n".join(checks),
            where=None,
        )

    def _read(self, report: LoadReport) -> Iterator[Problem]:
        assert self.rows is not None
        for where, row in self.rows.rows(self.task_name, self.on_bad_row, report):
            try:
                yield self._of_row(row, where)
            except BadRow as bad:
                report.reject(self.task_name, self.on_bad_row, bad.reason, f"{where}: {bad}")

    def _of_row(self, row: Any, where: str) -> Problem:
        question, names, roles = (lookup_or(row, key) for key in ("problem", "names", "roles"))
        if not isinstance(question, str) or not question.strip():
            raise BadRow("no question", "has no text at 'problem'")
        if not _is_list_of(names, str) or not names or len({name.casefold() for name in names}) < len(names):
            raise BadRow("bad names", f"'names' must be a list of different names, not {names!r}")
        if not _is_list_of(roles, str) or len(roles) != len(names) or not set(roles) <= {"knight", "knave"}:
            raise BadRow("bad roles", f"'roles' must say knight or knave for each of {len(names)} names, not {roles!r}")
        truth = [role == "knight" for role in roles]
        statements = _statements(lookup_or(row, "statements"), truth)
        solution = optional_text(row, "solution", "solution")
        check_text(question, solution or "")
        index = where.rpartition(":")[2]
        return self._problem(
            index=index,
            question=question.strip(),
            names=names,
            roles=truth,
            statements=statements,
            solution=solution,
            where=where,
        )

    def _problem(
        self,
        index: str,
        question: str,
        names: list[str],
        roles: Sequence[bool],
        statements: list[Statement],
        solution: str | None,
        where: str | None,
    ) -> Problem:
        answer = ", ".join(f"{name} is a {_role(role)}" for name, role in zip(names, roles, strict=True))
        metadata = {"names": names, "roles": [bool(role) for role in roles], "statements": statements}
        return Problem(
            id=f"{self.task_name}/{index}",
            task=self.task_name,
            question=question,
            answer=answer,
            solution=ending_in_answer(solution, answer),
            level=str(len(names)),
            metadata=metadata | ({"source": where} if where else {}),
        )


def _gold(problem: Problem) -> dict[str, bool]:
    names, roles = problem.metadata["names"], problem.metadata["roles"]
    return {name.casefold(): role for name, role in zip(names, roles, strict=True)}


def _roles_in(box: str | None) -> dict[str, bool]:
    """Return the role by name in lower case; the first mention of a name counts."""
    roles: dict[str, bool] = {}
    for name, role in _ROLE.findall(_TEXT_COMMAND.sub(r"\1", box or "")):
        roles.setdefault(name.casefold(), role.casefold() == "knight")
    return roles


def _role(is_knight: bool) -> str:
    return "knight" if is_knight else "knave"


def _contradiction(name: str, is_knight: bool) -> str:
    said = "false" if is_knight else "true"
    return f"With these roles what {name} says would be {said}, and the answer calls {name} a {_role(is_knight)}."


def _sentence(phrasing: str, name: str, statement: Statement, names: Sequence[str]) -> str:
    clause = in_words(statement, names)
    return phrasing.format(name=name, clause=clause, claim=clause[0].upper() + clause[1:])


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _statements(value: Any, roles: Sequence[bool]) -> list[Statement]:
    """Return a row's statements, given as nested lists or as the text of nested tuples; [] when it has none."""
    if not value:
        return []
    try:
        statements = [_tupled(s) for s in (ast.literal_eval(value) if isinstance(value, str) else value)]
        wrong = violated(statements, roles) if len(statements) == len(roles) else ["their number"]
    except (ValueError, SyntaxError, TypeError, IndexError) as error:
        raise BadRow("bad statements", f"'statements' cannot be read: {error}") from error
    if wrong:
        raise BadRow("statements and roles differ", f"'statements' do not fit 'roles': {wrong}")
    return statements


def _tupled(statement: Any) -> Any:
    return tuple(_tupled(part) for part in statement) if isinstance(statement, list | tuple) else statement
