"""Lettered choices: forms of rows, shuffling, the letter in a response, and rows that are refused."""

from __future__ import annotations

import json
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
from pydantic import TypeAdapter

from megatron_hdpo.data.tasks import TaskConfig
from megatron_hdpo.types.errors import DataError
from megatron_hdpo.types.load_report import LoadReport

TASK = TypeAdapter(TaskConfig)
GASES = ["Helium", "Neon", "Argon", "Xenon"]
ROW = {"question": "Which gas is the heaviest?", "choices": GASES, "answer": "D"}


def task(tmp_path, *rows, **config):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return TASK.validate_python({"kind": "letter_choice", "rows": {"path": str(path)}, **config})


def only(asked):
    (problem,) = asked.problems(LoadReport())
    return problem


def test_choices_are_part_of_the_question(tmp_path) -> None:
    problem = only(task(tmp_path, ROW | {"solution": "It has the most protons.", "level": 3}))
    assert problem.question == "Which gas is the heaviest?\n\nA. Helium\nB. Neon\nC. Argon\nD. Xenon"
    assert (problem.id, problem.answer, problem.level) == ("rows/1", "D", "3")
    assert problem.solution == "It has the most protons.\n\\boxed{D}"


@pytest.mark.parametrize(
    ("row", "config"),
    [
        ({"choices": {"text": GASES, "label": ["1", "2", "3", "4"]}, "answer": "4"}, {}),
        ({"choices": {"text": GASES}, "answer": "D"}, {}),
        ({"choices": dict(zip("ABCD", GASES, strict=True)), "answer": "D"}, {}),
        ({"choices": GASES, "answer": 3}, {"answer_is": "index"}),
        ({"choices": GASES, "answer": "Xenon"}, {"answer_is": "text"}),
        ({f"c{i}": gas for i, gas in enumerate(GASES)} | {"answer": "D"}, {"choices_key": ["c0", "c1", "c2", "c3"]}),
        ({"mc": {"options": GASES}, "answer": "D"}, {"choices_key": "mc.options"}),
    ],
)
def test_forms_of_rows(tmp_path, row, config) -> None:
    problem = only(task(tmp_path, {"question": "Which gas is the heaviest?", **row}, **config))
    assert problem.answer == "D" and problem.question.endswith("D. Xenon")


def test_parquet(tmp_path) -> None:
    path = tmp_path / "gases.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW]), path)
    asked = TASK.validate_python({"kind": "letter_choice", "rows": {"path": str(path)}})
    assert only(asked).answer == "D" and asked.task_name == "gases"


def test_rows_of_a_hugging_face_dataset(tmp_path) -> None:
    (tmp_path / "gases").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW]), tmp_path / "gases" / "train.parquet")
    rows = {"dataset": str(tmp_path / "gases"), "split": "train"}
    asked = TASK.validate_python({"kind": "letter_choice", "rows": rows})
    assert only(asked).answer == "D" and asked.task_name == "gases" and only(asked).id == "gases/1"


def test_shuffled_choices_are_spread_over_the_letters_and_depend_on_the_seed_alone(tmp_path) -> None:
    rows = [ROW | {"question": f"question {i}"} for i in range(200)]
    made = [task(tmp_path, *rows, shuffle_choices=seed).problems(LoadReport()) for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2]
    assert all(40 <= count <= 62 for count in Counter(p.answer for p in made[0]).values())
    for problem in made[0]:
        assert f"{problem.answer}. Xenon" in problem.question
        assert sorted(problem.metadata["choices"]) == sorted(GASES)


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        (r"\boxed{D}", 1.0),
        (r"\boxed{d}.", 1.0),
        (r"\boxed{\text{(D)}}", 1.0),
        (r"\boxed{D. Xenon}", 1.0),
        (r"\boxed{D) xenon}", 1.0),
        (r"\boxed{A} no, \boxed{D}", 1.0),
        (r"\boxed{\textbf{(D)}\ Xenon}", 1.0),
        (r"\boxed{**D**}", 1.0),
        (r"\boxed{**(D)** Xenon}", 1.0),
        (r"\boxed{Option D}", 1.0),
        (r"\boxed{\textbf{(D)}\ Argon}", 0.0),
        (r"\boxed{**A**}", 0.0),
        (r"\boxed{Option A}", 0.0),
        (r"\boxed{D. Argon}", 0.0),
        (r"\boxed{A, D}", 0.0),
        (r"\boxed{AD}", 0.0),
        (r"\boxed{Definitely}", 0.0),
        (r"\boxed{Xenon}", 0.0),
        (r"\boxed{A}", 0.0),
        ("the answer is D", 0.0),
        (r"<think>\boxed{D}", 0.0),
        ("", 0.0),
    ],
)
def test_grading(tmp_path, response, reward) -> None:
    asked = task(tmp_path, ROW)
    assert asked.score(only(asked), response) == reward


@pytest.mark.parametrize(
    ("response", "reward"), [("The answer is D.", 1.0), ("Answer: (D)", 1.0), ("C", 0.0), ("It is D, I think", 0.0)]
)
def test_lenient_answers(tmp_path, response, reward) -> None:
    asked = task(tmp_path, ROW, answer_format="lenient")
    assert asked.score(only(asked), response) == reward


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "E"}, r"rows.jsonl:1: the answer at 'answer' is 'E'; as label it must be one of A, B, C, D"),
        ({"answer": None}, "the answer at 'answer' is NoneType, not text or a number"),
        ({"choices": ["Neon"]}, "not 2 to 26 texts"),
        ({"choices": "Neon"}, "not 2 to 26 texts"),
        ({"choices": ["Neon", None]}, "the choice at 'choices' is NoneType, not text"),
        ({"choices": ["Neon", " "]}, "not all texts"),
        ({"choices": ["Neon", "neon ", "Argon", "Xenon"]}, "two of the choices are the same"),
        ({"question": ""}, "has no text at 'question'"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, change, message) -> None:
    with pytest.raises(DataError, match=message):
        task(tmp_path, ROW | change).problems(LoadReport())
    report = LoadReport()
    good = ROW | {"question": "good"}
    assert len(task(tmp_path, ROW | change, good, on_bad_row="drop").problems(report)) == 1
    assert sum(report.counts["rows"].values()) == 1


def test_questions_are_not_asked_twice(tmp_path) -> None:
    reordered = ROW | {"choices": GASES[::-1], "answer": "A"}
    with pytest.raises(DataError, match=r"the same question and choices as .*rows.jsonl:1"):
        task(tmp_path, ROW, reordered).problems(LoadReport())
    other = ROW | {"choices": ["Radon", *GASES[1:]]}
    assert len(task(tmp_path, ROW, other).problems(LoadReport())) == 2
    assert len(task(tmp_path, ROW, other, limit=1).problems(LoadReport())) == 1
