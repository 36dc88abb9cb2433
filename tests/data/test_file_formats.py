"""CSV, JSON lists and saved datasets: the same problems from each, and errors that name file and row."""

from __future__ import annotations

import csv
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from pydantic import TypeAdapter, ValidationError

from megatron_hdpo.data.tasks import TaskConfig
from megatron_hdpo.data.tasks.files import FileTaskBase
from megatron_hdpo.types.errors import DataError
from megatron_hdpo.types.load_report import LoadReport

ROWS = [
    {"problem": f'Say "{i}",\nthen ü+{i}', "answer": str(i), "solution": f"it is {i}", "level": f"{i % 2}"}
    for i in range(6)
]


def task(**config) -> FileTaskBase:
    return TypeAdapter(TaskConfig).validate_python(config)


def read(report=None, **config):
    return task(**config).problems(report or LoadReport())


def texts(problems):
    return [(p.question, p.answer, p.solution, p.level) for p in problems]


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """The same rows in every form that tasks read; the task's keys by form."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=1, ensure_ascii=False), encoding="utf-8")
    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "alone")
    datasets.DatasetDict({"test": rows.select([0]), "mine": rows}).save_to_disk(tmp_path / "dict")
    files = {kind: {"kind": kind, "path": tmp_path / f"rows.{kind}"} for kind in ("jsonl", "json", "csv", "parquet")}
    return files | {
        "alone": {"kind": "huggingface", "dataset": str(tmp_path / "alone")},
        "dict": {"kind": "huggingface", "dataset": str(tmp_path / "dict"), "split": "mine"},
    }


def test_every_form_gives_the_same_problems(sources):
    wanted = texts(read(**sources.pop("jsonl")))
    assert len(wanted) == len(ROWS)
    for form, keys in sources.items():
        assert texts(read(**keys)) == wanted, form


def test_row_sources_read_files_by_suffix(sources, tmp_path):
    choices = {"choices_key": ["level", "solution"], "question_key": "problem", "answer_is": "text"}
    keys = {"kind": "letter_choice", "answer_key": "solution", **choices}
    questions = [
        [p.question for p in read(rows={"path": str(tmp_path / f"rows.{suffix}")}, **keys)]
        for suffix in ("jsonl", "json", "csv", "parquet")
    ]
    assert len(questions[0]) == len(ROWS)
    assert all(found == questions[0] for found in questions)


def test_content_changes_with_the_rows_alone(sources, tmp_path):
    before = {form: task(**keys).content() for form, keys in sources.items()}
    assert before == {form: task(**keys, limit=2).content() for form, keys in sources.items()}
    assert None not in before.values()
    path = tmp_path / "rows.csv"
    path.write_bytes(path.read_bytes().replace(b"it is 3", b"it is 4"))
    datasets.Dataset.from_list(ROWS[1:]).save_to_disk(tmp_path / "other")
    assert task(**sources["csv"]).content() != before["csv"]
    assert task(kind="huggingface", dataset=str(tmp_path / "other")).content() != before["alone"]
    assert task(**sources["dict"] | {"split": "test"}).content() != before["dict"]


def test_content_of_a_folder_of_files_changes_with_a_file(sources, tmp_path):
    (tmp_path / "set").mkdir()
    file = tmp_path / "set" / "train.jsonl"
    file.write_bytes((tmp_path / "rows.jsonl").read_bytes())
    keys = {"kind": "huggingface", "dataset": str(tmp_path / "set")}
    first = task(**keys).content()
    assert task(**keys).content() == first
    file.write_bytes(file.read_bytes().replace(b"it is 3", b"it is not 3"))
    assert task(**keys).content() != first
    assert read(**keys)[3].solution.startswith("it is not 3")


@pytest.mark.parametrize(
    ("split", "numbers"), [("mine[:50%]", [0, 1, 2]), ("mine[-2:]", [4, 5]), ("test+mine[5:]", [0, 5])]
)
def test_saved_datasets_have_splits_and_slices(sources, split, numbers):
    assert [p.answer for p in read(**sources["dict"] | {"split": split})] == [str(i) for i in numbers]


def test_an_unknown_split_of_a_saved_dataset_names_the_known_ones(sources):
    with pytest.raises(DataError, match=r"cannot load .*dict\[train\]: .*train.*(mine|test)"):
        read(**sources["dict"] | {"split": "train"})
    assert len(read(**sources["alone"] | {"split": "train[:2]"})) == 2


BROKEN_CSV = [
    ("a,1\n\n", "wrong number of values", r"rows\.csv:3: has 2 values, the header names 3 columns"),
    ("a,1,2,3\n", "wrong number of values", r"rows\.csv:3: has 4 values"),
    ('"a"b,1,\n', "not CSV", r"rows\.csv:3: not CSV up to line 3: ',' expected after '\"'"),
    (",1,\n", "empty question", r"rows\.csv:3: the question at 'problem' is empty"),
]


@pytest.mark.parametrize(("line", "reason", "message"), BROKEN_CSV)
def test_broken_csv_rows_name_their_line(tmp_path, line, reason, message):
    path = tmp_path / "rows.csv"
    path.write_text(f"problem,answer,solution\ngood,1,\n{line}last,2,\n")
    with pytest.raises(DataError, match=message):
        read(kind="csv", path=path)
    report = LoadReport()
    kept = read(report, kind="csv", path=path, on_bad_row="drop")
    assert [p.question for p in kept] == ["good", "last"]
    assert report.counts == {"rows": {reason: 1}}


def test_a_quote_that_never_ends_names_the_line_where_it_begins(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('problem,answer\n"two\nlines",1\n"open,2\nmore,3\n')
    with pytest.raises(DataError, match=r"rows\.csv:4: not CSV up to line 5: unexpected end of data"):
        read(kind="csv", path=path)
    assert [p.id for p in read(kind="csv", path=path, on_bad_row="drop")] == ["rows/2"]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("", "the header is empty"),
        ("problem,answer,problem", "the header names the column 'problem' twice"),
        ("problem;answer", "the header names one column, 'problem;answer': write delimiter: ';'"),
    ],
)
def test_wrong_csv_headers(tmp_path, header, message):
    (tmp_path / "rows.csv").write_text(f"{header}\n")
    with pytest.raises(DataError, match=rf"rows\.csv:1: {message}"):
        read(kind="csv", path=tmp_path / "rows.csv")


def test_csv_delimiters_and_filters(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("problem;answer;level\na;1;1\nb;2;2\n")
    assert [p.answer for p in read(kind="csv", path=path, delimiter=";", filter={"level": ["2"]})] == ["2"]
    with pytest.raises(ValidationError, match="level lists 2, and the values of a CSV file are texts: write quotes"):
        task(kind="csv", path=path, filter={"level": [2]})
    with pytest.raises(ValidationError, match="delimiter"):
        task(kind="csv", path=path, delimiter="; ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"problem": "a"}', r"rows\.json holds one dict; kind: json reads a list of objects"),
        ('{"problem": "a"}\n{"problem": "b"}', r"rows\.json:2 is not JSON: Extra data .*write kind: jsonl"),
        ('[{"problem": "a", "answer": "1"}, 7]', r"rows\.json:2: has no key 'problem' \(it has: int\)"),
    ],
)
def test_wrong_json_files(tmp_path, text, message):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read(kind="json", path=tmp_path / "rows.json")


def test_a_json_list_is_no_file_of_objects(tmp_path):
    (tmp_path / "rows.jsonl").write_text('[{"problem": "a", "answer": "1"}]')
    with pytest.raises(DataError, match=r"rows\.jsonl:1: is a JSON list; .* write kind: json"):
        read(kind="jsonl", path=tmp_path / "rows.jsonl", on_bad_row="drop")


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_text_that_is_not_unicode_is_a_bad_row(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    rows = {
        "jsonl": b'{"problem": "caf\xe9", "answer": "1"}\n{"problem": "b", "answer": "2"}\n',
        "json": b'[{"problem": "half \\ud800", "answer": "1"}, {"problem": "b", "answer": "2"}]',
        "csv": b"problem,answer\ncaf\xe9,1\nb,2\n",
    }
    path.write_bytes(rows[kind])
    with pytest.raises(DataError, match=rf"rows\.{kind}:[12]: holds bytes that are not UTF-8 text, around '(caf|half)"):
        read(kind=kind, path=path)
    report = LoadReport()
    assert [p.answer for p in read(report, kind=kind, path=path, on_bad_row="drop")] == ["2"]
    assert report.counts == {"rows": {"not Unicode": 1}}
