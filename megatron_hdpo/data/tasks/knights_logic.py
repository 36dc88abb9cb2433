"""Statements of knights and knaves: their meaning, the assignments of roles that they allow, and their generation.

A statement is a tuple: ("telling-truth", i) says that person i is a knight, ("lying", i) that they are a knave; ("not",
s), ("and", s, s), ("or", s, s), ("->", s, s) and ("<=>", s, s) join statements. The data of Xie et al. 2024 (arXiv
2410.23123) and reasoning-gym use the same form.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

Statement = tuple[Any, ...]

LEAVES = ("telling-truth", "lying")
_JOINED = {"and": "{} and {}", "or": "{} or {}", "->": "if {} then {}", "<=>": "{} if and only if {}"}
_DIE = ("leaf", "not", "and", "or", "->", "<=>")
_MAX_TRIES = 1000


def holds(statement: Statement, roles: Sequence[Any]) -> Any:
    """Return whether a statement is true.

    roles[i]: whether person i is a knight; booleans, or arrays of them for many assignments at once. Raises ValueError
    for an unknown operator.
    """
    operator, *parts = statement
    if operator in LEAVES:
        role = roles[parts[0]]
        return role if operator == "telling-truth" else np.logical_not(role)
    values = [holds(part, roles) for part in parts]
    if operator == "not":
        return np.logical_not(values[0])
    if operator == "and":
        return np.logical_and(*values)
    if operator == "or":
        return np.logical_or(*values)
    if operator == "->":
        return np.logical_or(np.logical_not(values[0]), values[1])
    if operator == "<=>":
        return np.equal(*values)
    raise ValueError(f"a statement has the operator {operator!r}")


def violated(statements: Sequence[Statement], roles: Sequence[bool]) -> list[int]:
    """Return the people whose statement does not fit their role: a knight's is true, a knave's false."""
    return [i for i, statement in enumerate(statements) if bool(holds(statement, roles)) != roles[i]]


def solutions(statements: Sequence[Statement]) -> list[tuple[bool, ...]]:
    """Return all assignments of roles under which knights' statements are true and knaves' are false."""
    people = len(statements)
    roles_AP = np.array(list(product((True, False), repeat=people)))
    columns = list(roles_AP.T)
    fits_A = np.all([holds(s, columns) == columns[i] for i, s in enumerate(statements)], axis=0)
    return [tuple(bool(role) for role in row) for row in roles_AP[fits_A]]


def draw_statements(people: int, rng: random.Random) -> tuple[list[Statement], tuple[bool, ...]]:
    """Return one statement of each person, and the only assignment that they allow.

    Raises ValueError when a thousand draws give none.
    """
    for _ in range(_MAX_TRIES):
        statements = [_draw(speaker, people, rng) for speaker in range(people)]
        found = solutions(statements)
        if len(found) == 1:
            return statements, found[0]
    raise ValueError(f"{_MAX_TRIES} draws gave no statements of {people} people that allow one assignment only")


def in_words(statement: Statement, names: Sequence[str]) -> str:
    """Return a statement as a clause without capital and full stop."""
    operator, *parts = statement
    if operator in LEAVES:
        return f"{names[parts[0]]} is a {'knight' if operator == 'telling-truth' else 'knave'}"
    if operator == "not":
        return in_words(parts[0], names).replace(" is a ", " is not a ")
    return _JOINED[operator].format(*(in_words(part, names) for part in parts))


def _draw(speaker: int, people: int, rng: random.Random) -> Statement:
    """Return a random statement: a leaf, or two different statements joined."""
    operator = rng.choice(_DIE)
    first = _leaf(speaker, people, rng)
    if operator == "leaf":
        return first
    if operator == "not":
        return ("not", first)
    second = first
    while second == first:
        second = _leaf(speaker, people, rng)
    return (operator, first, second)


def _leaf(speaker: int, people: int, rng: random.Random) -> Statement:
    """Return a random leaf; no person calls themselves a liar, because neither a knight nor a knave can."""
    while True:
        leaf = (rng.choice(LEAVES), rng.randrange(people))
        if leaf != ("lying", speaker):
            return leaf
