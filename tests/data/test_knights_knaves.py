"""Knights and knaves: puzzles with one solution, exact grading, and feedback that says what does not fit."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import product

import pytest
from pydantic import TypeAdapter, ValidationError

from megatron_hdpo.data.tasks import TaskConfig
from megatron_hdpo.data.tasks.knights_logic import draw_statements, holds, solutions
from megatron_hdpo.types.errors import DataError
from megatron_hdpo.types.load_report import LoadReport

TASK = TypeAdapter(TaskConfig)
ROW = {
    "problem": "Ann says: Bob lies. Bob says: if I tell the truth then Ann lies.",
    "names": ["Ann", "Bob"],
    "roles": ["knave", "knight"],
    "statements": "(('lying', 1), ('->', ('telling-truth', 1), ('lying', 0)))",
    "solution": "Bob tells the truth.",
}


def task(**config):
    return TASK.validate_python({"kind": "knights_knaves", **config})


def of_rows(tmp_path, *rows, **config):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return task(rows={"path": str(path)}, **config)


def truth(statement, roles) -> bool:
    """The meaning of a statement, by Python's own words."""
    match statement:
        case ("telling-truth", i):
            return roles[i]
        case ("lying", i):
            return not roles[i]
        case ("not", a):
            return not truth(a, roles)
        case ("and", a, b):
            return truth(a, roles) and truth(b, roles)
        case ("or", a, b):
            return truth(a, roles) or truth(b, roles)
        case ("->", a, b):
            return truth(b, roles) if truth(a, roles) else True
        case ("<=>", a, b):
            return truth(a, roles) is truth(b, roles)
    raise AssertionError(statement)


def test_every_puzzle_has_one_solution_and_it_is_the_answer() -> None:
    made = task(people=[2, 3, 5], size=60, seed=3).problems(LoadReport())
    assert [p.level for p in made[:4]] == ["2", "3", "5", "2"] and len({p.question for p in made}) == 60
    for problem in made:
        names, statements = problem.metadata["names"], problem.metadata["statements"]
        fits = [
            roles
            for roles in product([True, False], repeat=len(names))
            if all(truth(s, roles) == roles[i] for i, s in enumerate(statements))
        ]
        assert fits == [tuple(problem.metadata["roles"])] == solutions(statements)
        assert all(name in problem.question for name in names)
        assert f"{names[0]} is a {'knight' if fits[0][0] else 'knave'}" in problem.answer
        assert problem.solution.endswith(f"\\boxed{{{problem.answer}}}")


def test_statements_are_drawn_by_the_die() -> None:
    rng = random.Random(0)
    drawn = [s for _ in range(400) for s in draw_statements(5, rng)[0]]
    shares = Counter("leaf" if s[0] in ("lying", "telling-truth") else s[0] for s in drawn)
    assert set(shares) == {"leaf", "not", "and", "or", "->", "<=>"}
    assert all(0.12 < count / len(drawn) < 0.22 for count in shares.values())
    for i, statement in enumerate(drawn):
        leaves = [statement] if isinstance(statement[1], int) else list(statement[1:])
        assert len(set(leaves)) == len(leaves) and ("lying", i % 5) not in leaves


def test_an_operator_that_there_is_none_of() -> None:
    with pytest.raises(ValueError, match="the operator 'xor'"):
        holds(("xor", ("lying", 0), ("lying", 1)), [True, False])


def test_puzzles_depend_on_the_seed_alone() -> None:
    first, again, other = (task(people=[3], size=20, seed=s).problems(LoadReport()) for s in (1, 1, 2))
    assert first == again and not {p.question for p in first} & {p.question for p in other}


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        (r"so \boxed{Ann is a knave, Bob is a knight}", 1.0),
        (r"\boxed{\text{Bob: knight}; \text{Ann = knave}}", 1.0),
        (r"\boxed{(1) ann is Knave\\(2) BOB is a Knight}", 1.0),
        (r"\boxed{Ann is a knight, Bob is a knave}</think> \boxed{Ann is a knave, Bob is a knight}", 1.0),
        (r"\boxed{Ann is a knave, Bob is a knight, Bob is a knave}", 1.0),  # what is said first counts
        (r"\boxed{Bob is a knave, Ann is a knave, Bob is a knight}", 0.0),
        (r"\boxed{Ann is a knave}", 0.0),
        (r"\boxed{Ann is a knave, Bob is a knight, Cat is a knight}", 0.0),
        (r"\boxed{Ann is a knight, Bob is a knight}", 0.0),
        (r"\boxed{Ann is not a knight, Bob is a knight}", 0.0),
        ("Ann is a knave, Bob is a knight", 0.0),
        (r"\boxed{Ann is a knave, Bob is a knight", 0.0),
        (r"<think>\boxed{Ann is a knave, Bob is a knight}", 0.0),
        ("", 0.0),
    ],
)
def test_grading(tmp_path, response, reward) -> None:
    asked = of_rows(tmp_path, ROW)
    (problem,) = asked.problems(LoadReport())
    assert asked.score(problem, response) == reward
    assert (asked.feedback(problem, response) is None) == bool(reward)


@pytest.mark.parametrize(
    ("response", "said"),
    [
        ("I do not know", r"The response gives no role in \boxed{}."),
        (r"\boxed{Ann is a knave}", "The answer says nothing of Bob."),
        (r"\boxed{Ann is a knave, Bob is a knight, Cat is a knight}", "names cat, and there is nobody called so"),
        (r"\boxed{Ann is a knight, Bob is a knight}", "With these roles what Ann says would be false"),
        (r"\boxed{Ann is a knave, Bob is a knave}", "what Bob says would be true, and the answer calls Bob a knave"),
    ],
)
def test_feedback_says_what_does_not_fit(tmp_path, response, said) -> None:
    asked = of_rows(tmp_path, ROW)
    (problem,) = asked.problems(LoadReport())
    assert said in asked.feedback(problem, response)


def test_a_wrong_answer_always_contradicts_somebody() -> None:
    asked = task(people=[4], size=10)
    for problem in asked.problems(LoadReport()):
        names = problem.metadata["names"]
        for roles in product(["knight", "knave"], repeat=4):
            response = f"\\boxed{{{', '.join(f'{n}: {r}' for n, r in zip(names, roles, strict=True))}}}"
            feedback = asked.feedback(problem, response)
            assert feedback is None if asked.score(problem, response) else "With these roles what" in feedback


def test_rows(tmp_path) -> None:
    asked = of_rows(tmp_path, ROW, {**ROW, "problem": "other", "statements": None, "solution": None})
    first, second = asked.problems(LoadReport())
    assert (first.id, first.level, first.answer) == ("rows/1", "2", "Ann is a knave, Bob is a knight")
    assert first.solution == "Bob tells the truth.\n\\boxed{Ann is a knave, Bob is a knight}"
    assert asked.score(first, first.solution) == 1.0
    assert second.solution is None and "not right" in asked.feedback(second, r"\boxed{Ann: knight, Bob: knight}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ["Ann", "ann"]}, r"rows.jsonl:1: 'names' must be a list of different names"),
        ({"roles": ["knave"]}, "'roles' must say knight or knave for each of 2 names"),
        ({"roles": ["knave", "spy"]}, "'roles' must say knight or knave"),
        ({"problem": " "}, "has no text at 'problem'"),
        ({"statements": "(('lying', 1),"}, "'statements' cannot be read"),
        ({"statements": "(('lying', 7), ('lying', 0))"}, "'statements' cannot be read"),
        ({"statements": "(('lying', 1), ('telling-truth', 0))"}, "do not fit 'roles'"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, change, message) -> None:
    with pytest.raises(DataError, match=message):
        of_rows(tmp_path, ROW | change).problems(LoadReport())
    report = LoadReport()
    good = ROW | {"problem": "good"}
    assert len(of_rows(tmp_path, ROW | change, good, on_bad_row="drop").problems(report)) == 1
    assert sum(report.counts["rows"].values()) == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"people": [1]}, "puzzles have 2 to 14 people"),
        ({"people": []}, "at least 1 item"),
        ({"rows": {}}, "give either path or dataset"),
        ({"rows": {"path": "x.tsv"}}, r"path must end in .jsonl, .json, .csv, .parquet, not .tsv"),
        ({"rows": {"path": "x.jsonl", "dataset": "y"}}, "give either path or dataset"),
    ],
)
def test_wrong_configurations_are_refused(config, message) -> None:
    with pytest.raises(ValidationError, match=message):
        task(**config)
