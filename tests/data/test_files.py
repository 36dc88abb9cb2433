"""Problems from files: what is read, and one clear error, with file and line, for each thing that can be wrong."""

from __future__ import annotations

import json
from decimal import Decimal

import pyarrow
import pyarrow.parquet
import pytest

from megatron_hdpo.data.tasks import HuggingFaceTask, JsonlTask, JsonTask, ParquetTask
from megatron_hdpo.data.tasks.rows import question_key
from megatron_hdpo.types.errors import DataError
from megatron_hdpo.types.load_report import LoadReport
from megatron_hdpo.types.problem import Problem

GOOD = {"problem": "What is 2+2?", "answer": "4", "solution": "2+2 = 4", "level": 1}
ROWS = [GOOD | {"problem": f"What is {i}+{i}?", "answer": 2 * i, "level": i % 3} for i in range(9)]


def write(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def read(path, report=None, **config):
    return JsonlTask(kind="jsonl", path=path, **config).problems(report or LoadReport())


def task_of(kind, path, text):
    path.write_text(text)
    return kind(kind=path.suffix[1:], path=path)


@pytest.fixture
def rows_file(tmp_path):
    return write(tmp_path / "rows.jsonl", ROWS)


def test_rows_become_problems(rows_file):
    first = read(rows_file)[0]
    assert (first.id, first.task, first.question) == ("rows/1", "rows", "What is 0+0?")
    assert (first.answer, first.level) == ("0", "0")
    assert first.metadata["source"] == f"{rows_file}:1"


def test_solutions_end_in_the_answer(tmp_path):
    rows = [GOOD, GOOD | {"problem": "b", "solution": r"so \boxed{4}."}, {"problem": "c", "answer": "4"}]
    solutions = [p.solution for p in read(write(tmp_path / "a.jsonl", rows))]
    assert solutions == ["2+2 = 4\n\\boxed{4}", r"so \boxed{4}.", None]


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("0.00001", "0.00001"),
        ("1e-05", "0.00001"),
        ("-2.5e-7", "-0.00000025"),
        ("1e16", "10000000000000000"),
        ("1e+23", "1" + "0" * 23),
        ("0.1", "0.1"),
        ("1.50", "1.50"),
        ("-0.0", "-0.0"),
        ("0.12345678901234567890123", "0.12345678901234567890123"),
        ("123456789012345678901234567890", "123456789012345678901234567890"),
    ],
)
def test_numbers_of_json_are_answers_in_plain_decimals(tmp_path, written, text):
    (problem,) = read(write(tmp_path / "a.jsonl", [f'{{"problem": "q", "answer": {written}}}']))
    assert problem.answer == text
    same = task_of(JsonTask, tmp_path / "a.json", f'[{{"problem": "q", "answer": {written}}}]').problems(LoadReport())
    assert same[0].answer == text


def test_numbers_of_parquet_are_answers_in_plain_decimals(tmp_path):
    columns = {
        "float64": pyarrow.array([1e-5, 1e16, 0.1]),
        "float32": pyarrow.array([0.5, 2.0**30, 0.25], pyarrow.float32()),
        "decimal": pyarrow.array([Decimal("0.000001"), Decimal("1E+2"), Decimal("7.10")], pyarrow.decimal128(20, 8)),
    }
    expected = {
        "float64": ["0.00001", "10000000000000000", "0.1"],
        "float32": ["0.5", "1073741824", "0.25"],
        "decimal": ["0.00000100", "100.00000000", "7.10000000"],
    }
    pyarrow.parquet.write_table(pyarrow.table({"problem": list("abc"), **columns}), tmp_path / "a.parquet")
    for column, texts in expected.items():
        task = ParquetTask(kind="parquet", path=tmp_path / "a.parquet", answer_key=column)
        found = [problem.answer for problem in task.problems(LoadReport())]
        assert [Decimal(text) for text in found] == [Decimal(text) for text in texts]
        assert not any("e" in text.lower() for text in found)


def test_a_missing_solution_of_pandas_is_none(tmp_path):
    rows = ['{"problem": "a", "answer": 1, "solution": NaN}', '{"problem": "b", "answer": 1, "solution": null}']
    assert [problem.solution for problem in read(write(tmp_path / "a.jsonl", rows))] == [None, None]


def test_a_word_may_be_none_where_answers_are_texts(tmp_path):
    path = write(tmp_path / "a.jsonl", [GOOD | {"answer": "None"}])
    assert read(path, scorer="exact")[0].answer == "None"


def test_filters_compare_numbers_as_numbers(rows_file, tmp_path):
    path = write(tmp_path / "a.jsonl", ['{"problem": "a", "answer": 1, "level": 1e-1}', GOOD | {"level": 0.2}])
    assert [p.question for p in read(path, filter={"level": [0.1]})] == ["a"]


def test_filter_limit_and_shuffle(rows_file):
    assert [p.id for p in read(rows_file, filter={"level": [1, 2]})] == [f"rows/{i}" for i in (2, 3, 5, 6, 8, 9)]
    assert len(read(rows_file, limit=4)) == 4
    shuffled = [p.id for p in read(rows_file, shuffle_seed=1)]
    assert sorted(shuffled) == sorted(p.id for p in read(rows_file)) != shuffled
    assert shuffled[:3] == [p.id for p in read(rows_file, shuffle_seed=1, limit=3)]


def test_a_source_is_read_where_a_key_names_it(tmp_path):
    path = write(tmp_path / "a.jsonl", [GOOD | {"subject": "Algebra"}, GOOD | {"problem": "b"}])
    assert [problem.source for problem in read(path)] == [None, None]
    assert [problem.source for problem in read(path, source_key="subject")] == ["Algebra", None]


def test_nested_keys_patterns_and_answers_from_solutions(tmp_path):
    row = {"prompt": [{"content": "Q"}], "reward_model": {"ground_truth": "1 + 1 #### 1\nno #### 2 "}}
    keys = {"question_key": "prompt.0.content", "answer_key": "reward_model.ground_truth"}
    path = write(tmp_path / "a.jsonl", [row])
    (problem,) = read(path, answer_pattern=r"#### (.*)", **keys)
    assert (problem.question, problem.answer) == ("Q", "2")
    (problem,) = read(
        write(tmp_path / "b.jsonl", [{"problem": "Q", "solution": r"\boxed{1} or \boxed{x^{2}}"}]), answer_key=None
    )
    assert problem.answer == "x^{2}"


def test_parquet_and_hugging_face_read_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "set").mkdir()
    table = pyarrow.Table.from_pylist([row | {"answer": str(row["answer"])} for row in ROWS])
    pyarrow.parquet.write_table(table, tmp_path / "set" / "train.parquet")
    parquet = ParquetTask(kind="parquet", path=tmp_path / "set" / "train.parquet").problems(LoadReport())
    hub = HuggingFaceTask(kind="huggingface", dataset=str(tmp_path / "set"), split="train[:5]")
    loaded = hub.problems(LoadReport())
    assert [p.question for p in parquet] == [row["problem"] for row in ROWS]
    assert [p.question for p in loaded] == [row["problem"] for row in ROWS[:5]]
    assert loaded[4].metadata["source"] == f"{tmp_path / 'set'}[train[:5]]:5"


def test_scorers():
    math, exact = (JsonlTask(kind="jsonl", path="x.jsonl", scorer=scorer) for scorer in ("math", "exact"))
    half = Problem("x/1", "x", "?", r"\frac{1}{2}")
    assert (math.score(half, r"\boxed{0.5}"), exact.score(half, r"\boxed{0.5}")) == (1.0, 0.0)
    assert (math.needs_parsed_gold, exact.needs_parsed_gold) == (True, False)


def test_a_list_of_one_text_is_that_text(tmp_path):
    """Only what is compared by meaning: a list may be what an exact answer has to be."""
    answers = ['["18"]', '[ "x + 1" ]', "[1, 2]"]
    rows = write(tmp_path / "a.jsonl", [{"problem": f"Q{i}", "answer": a} for i, a in enumerate(answers)])
    assert [problem.answer for problem in read(rows)] == ["18", "x + 1", "[1, 2]"]
    assert [problem.answer for problem in read(rows, scorer="exact")] == answers


BAD_ROWS = [
    (GOOD | {"problem": "q", "answer": '["1", "2"]'}, "answer is a list", r"bad\.jsonl:2: has a list as its answer"),
    (GOOD | {"problem": "q", "answer": "['1']"}, "answer is a list", r"bad\.jsonl:2: has a list as its answer"),
    (GOOD | {"problem": "q", "answer": '["1"'}, "answer is a list", r"bad\.jsonl:2: has a list as its answer"),
    ("{not json", "not JSON", r"bad\.jsonl:2: not JSON: Expecting property name .* at column 2"),
    ("[1, 2]", "missing key", r"bad\.jsonl:2: has no key 'problem' \(it has: list\)"),
    ({"answer": "4"}, "missing key", r"bad\.jsonl:2: has no key 'problem' \(it has: answer\)"),
    ({"problem": "q"}, "missing key", r"bad\.jsonl:2: has no key 'answer' \(it has: problem\)"),
    (GOOD | {"problem": "  "}, "empty question", r"bad\.jsonl:2: the question at 'problem' is empty"),
    (GOOD | {"problem": "q", "answer": ""}, "empty answer", r"bad\.jsonl:2: the answer at 'answer' is empty"),
    (GOOD | {"problem": "q", "answer": None}, "answer is no text", r"the answer at 'answer' is NoneType"),
    (GOOD | {"problem": ["q"]}, "question is no text", r"the question at 'problem' is list, not text"),
    (GOOD | {"problem": "q", "answer": True}, "answer is no text", r"is bool, not text or a number"),
    (
        '{"problem": "q", "answer": NaN}',
        "answer is no text",
        r"bad\.jsonl:2: the answer at 'answer' is nan, not a finite",
    ),
    ('{"problem": "q", "answer": -Infinity}', "answer is no text", r"the answer at 'answer' is -inf, not a finite"),
    ('{"problem": "q", "answer": 1e999999999}', "answer is no text", r"is a number of 999,999,999 digits, not a final"),
    ('{"problem": NaN, "answer": "1"}', "question is no text", r"the question at 'problem' is nan, not a finite"),
    (
        '{"problem": "q", "answer": "1", "answer": "2"}',
        "not JSON",
        r"bad\.jsonl:2: not JSON: an object has the key 'answ",
    ),
    (
        f'{{"problem": "q", "answer": {"9" * 5000}}}',
        "not JSON",
        r"bad\.jsonl:2: not JSON: it holds a number of 5,000 digi",
    ),
    ("[" * 100_000, "not JSON", r"bad\.jsonl:2: not JSON: its lists or objects are nested too deep"),
    (GOOD | {"problem": "q", "answer": "nan"}, "no answer", r"the answer at 'answer' is 'nan', which is no value"),
    (GOOD | {"problem": "q", "answer": "None"}, "no answer", r"the answer at 'answer' is 'None', which is no value"),
    (GOOD | {"problem": "q", "answer": "-inf"}, "no answer", r"the answer at 'answer' is '-inf', which is no value"),
    (
        GOOD | {"problem": "q", "solution": "nan"},
        "no solution",
        r"the solution at 'solution' is 'nan', which is no val",
    ),
    (GOOD | {"problem": "q", "solution": ["a", "b"]}, "solution is no text", r"at 'solution' is list, not text"),
    (GOOD | {"problem": "q", "solution": {"text": "a"}}, "solution is no text", r"at 'solution' is dict, not text"),
    (
        '{"problem": "q", "answer": "1", "solution": Infinity}',
        "solution is no text",
        r"'solution' is inf, not a finite",
    ),
    (GOOD | {"problem": "q", "level": ["hard"]}, "level is no text", r"the level at 'level' is list, not text"),
    (GOOD | {"problem": "q", "level": "\ud83d"}, "not Unicode", r"bad\.jsonl:2: holds bytes that are not UTF-8 text"),
    (GOOD | {"problem": "what is $2 + 2$?"}, "duplicate question", r"bad\.jsonl:2: has the same question as .*:1"),
]


@pytest.mark.parametrize(("row", "reason", "message"), BAD_ROWS)
def test_bad_rows_stop_the_load_or_are_counted(tmp_path, row, reason, message):
    path = write(tmp_path / "bad.jsonl", [GOOD, row, GOOD | {"problem": "another"}])
    with pytest.raises(DataError, match=message) as error:
        read(path)
    assert "correct the row, or set on_bad_row: drop for task 'bad'" in str(error.value)
    report = LoadReport()
    assert [p.id for p in read(path, report, on_bad_row="drop")] == ["bad/1", "bad/3"]
    assert report.counts == {"bad": {reason: 1}}
    assert any("1 left out" in line and ":2" in line for line in report.lines())


@pytest.mark.parametrize(
    ("row", "config", "message"),
    [
        (GOOD, {"answer_pattern": r"#### (\d+)"}, "answer_pattern finds nothing in the answer '4'"),
        (GOOD, {"answer_key": None}, r"has no \\boxed\{\} answer in its solution"),
        (GOOD, {"filter": {"subject": ["algebra"]}}, "has no key 'subject'"),
        (GOOD, {"filter": {"level": [9]}}, r"no problem is left of .*rows\.jsonl; check filter"),
    ],
)
def test_keys_that_do_not_fit_the_rows_are_errors(tmp_path, row, config, message):
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / "rows.jsonl", [row]), **config)


def test_sources_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl does not exist; path must name a file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        read(tmp_path)
    write(tmp_path / "no.parquet", ["not parquet"])
    with pytest.raises(DataError, match=r"no\.parquet is not a readable Parquet file"):
        ParquetTask(kind="parquet", path=tmp_path / "no.parquet").problems(LoadReport())
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"the datasets library cannot load .*check dataset, subset and split"):
        HuggingFaceTask(kind="huggingface", dataset=str(tmp_path / "empty")).problems(LoadReport())


def test_questions_that_differ_in_spelling_only_are_the_same():
    assert question_key("What is $2 + 2$ ?") == question_key("what is 2+2?")
    assert question_key(r"\left( x \right)\,.") == question_key("(x)")
    assert question_key("What is 2-2?") != question_key("What is 2+2?")


def parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return ParquetTask(kind="parquet", path=path, on_bad_row="drop")


def test_parquet_rows_that_are_not_unicode_name_their_row(tmp_path):
    raw = pyarrow.array([b"a", b"caf\xe9", b"c"], pyarrow.binary()).view(pyarrow.utf8())
    task = parquet(tmp_path / "a.parquet", problem=raw, answer=["1", "2", "3"])
    report = LoadReport()
    assert [problem.id for problem in task.problems(report)] == ["a/1", "a/3"]
    assert report.counts == {"a": {"not readable": 1}} and "a.parquet:2:" in report.examples["a"]["not readable"]
    with pytest.raises(DataError, match=r"a\.parquet:2: cannot be read: 'utf-8' codec"):
        task.model_copy(update={"on_bad_row": "error"}).problems(LoadReport())


def test_parquet_missing_values_of_pandas(tmp_path):
    task = parquet(tmp_path / "a.parquet", problem=["a", "b", "c"], answer=[1.0, float("nan"), None])
    report = LoadReport()
    assert [problem.answer for problem in task.problems(report)] == ["1.0"]
    assert report.counts == {"a": {"answer is no text": 2}}


def test_damaged_parquet_is_one_clear_error(tmp_path):
    task = parquet(tmp_path / "a.parquet", problem=["question " * 20 + str(i) for i in range(300)], answer=["1"] * 300)
    whole = task.path.read_bytes()
    for place in range(4, len(whole), 61):
        damaged = bytearray(whole)
        damaged[place] ^= 0x5A
        task.path.write_bytes(damaged)
        try:
            task.problems(LoadReport())
        except DataError as error:
            assert "a.parquet" in str(error) and "\n" not in str(error)


def test_a_parquet_column_twice_is_refused(tmp_path):
    table = pyarrow.Table.from_arrays(
        [pyarrow.array(["a"]), pyarrow.array(["1"]), pyarrow.array(["2"])], names=["problem", "answer", "answer"]
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet is not a readable Parquet file: it has the column 'answer' twice"):
        ParquetTask(kind="parquet", path=tmp_path / "a.parquet").problems(LoadReport())
