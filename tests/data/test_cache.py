"""The cache of checked problems: what comes from it is what was checked, and nothing stale, damaged or half written."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import byte_tokenizer

from megatron_hdpo.data.cache import ProblemCache, entries
from megatron_hdpo.data.cache_key import task_key, tokenizer_digest
from megatron_hdpo.data.checked import CheckedProblems, ProblemChecker, question_hashes
from megatron_hdpo.data.config import DataConfig
from megatron_hdpo.data.load import load
from megatron_hdpo.data.prompts import PromptBuilder
from megatron_hdpo.data.tasks import JsonlTask
from megatron_hdpo.rewards.gold import GoldVerdict
from megatron_hdpo.types.errors import DataError
from megatron_hdpo.types.load_report import LoadReport
from megatron_hdpo.types.problem import Problem

TOKENIZER = byte_tokenizer()
ROWS = [{"problem": f"What is {i}+{i}?", "answer": str(2 * i), "level": i % 3} for i in range(40)]


class NoPool:
    """Refuses to parse gold answers: the tests here have plain numbers, or score by equal text."""

    def check_golds(self, answers):
        raise AssertionError(f"asked to parse {answers}")


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def section(tmp_path):
    """A data section that trains on 40 rows, 3 of which it evaluates on."""
    return {
        "train": [{"kind": "jsonl", "path": str(write(tmp_path / "train.jsonl", ROWS))}],
        "evaluation": [{"kind": "jsonl", "path": str(write(tmp_path / "eval.jsonl", ROWS[5:8]))}],
        "cache_dir": str(tmp_path / "cache"),
    }


def loaded(section, tokenizer=TOKENIZER, **flags):
    return load(DataConfig.model_validate(section), tokenizer, NoPool(), **flags)


def is_fresh(data) -> dict[str, bool]:
    return {task: origin.fresh for task, origin in data.origins.items()}


def content(data):
    """All that a run sees of its data, metadata included (which equality of problems leaves out)."""
    problems = [repr(dataclasses.astuple(problem)) for problem in (*data.train, *data.evaluation)]
    return problems, data.report, [problem.id for problem in data.order.batch(0, min(8, len(data.train)))]


def cached_files(section) -> list[Path]:
    return entries(Path(section["cache_dir"]) / "problems")


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
ROW = st.fixed_dictionaries(
    {"problem": TEXT | st.sampled_from(["same", "SAME ", "what is <|end|>?", "long " * 60]), "answer": TEXT},
    optional={"solution": TEXT | st.just("x" * 300), "level": st.integers(0, 3) | st.none()},
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(ROW, max_size=30), evaluated=st.lists(ROW, max_size=4), hints=st.booleans())
def test_what_comes_from_the_cache_is_what_was_checked(tmp_path_factory, rows, evaluated, hints):
    folder = tmp_path_factory.mktemp("property")
    common = {"kind": "jsonl", "scorer": "exact", "on_bad_row": "drop"}
    last = {"problem": "the last one", "answer": "1"}
    section = {
        "train": [common | {"path": str(write(folder / "train.jsonl", [*rows, last]))}],
        "evaluation": [common | {"path": str(write(folder / "eval.jsonl", [*evaluated, last | {"problem": "e"}]))}],
        "prompts": {"max_prompt_tokens": 250, "max_privileged_tokens": 900},
        "cache_dir": str(folder / "cache"),
    }
    fresh, again = loaded(section, hints=hints), loaded(section, hints=hints)
    assert is_fresh(fresh) == {"train": True, "eval": True}
    assert is_fresh(again) == {"train": False, "eval": False}
    assert content(again) == content(fresh)


def test_a_second_load_reads_no_row(section, monkeypatch):
    first = loaded(section)
    assert first.report.counts == {"train": {"also evaluated on": 3}}
    monkeypatch.setattr(JsonlTask, "rows", lambda self, report: pytest.fail("rows were read again"))
    assert content(loaded(section)) == content(first)
    (file, _) = cached_files(section)
    assert file.name.startswith("eval-")


def test_generated_tasks_are_not_cached(section):
    sums = {"kind": "digit_sums", "lengths": [3], "size": 5}
    data = loaded(section | {"train": [sums]})
    assert str(data.origins["digit_sums"]) == "checked at this start, not cached"
    assert [file.name.partition("-")[0] for file in cached_files(section)] == ["eval"]


CHANGES = {
    "limit": lambda s: s["train"][0].update(limit=9),
    "keys": lambda s: s["train"][0].update(level_key="answer"),
    "scorer": lambda s: s["train"][0].update(scorer="exact"),
    "prompt": lambda s: s.update(prompts={"student": "{{ question }}!"}),
    "length": lambda s: s.update(prompts={"max_prompt_tokens": 999}),
    "content": lambda s: write(Path(s["train"][0]["path"]), [*ROWS, {"problem": "new", "answer": "1"}]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_decides_the_problems_is_part_of_the_key(section, change):
    loaded(section)
    CHANGES[change](section)
    assert is_fresh(loaded(section))["train"]


def test_tokenizer_flags_and_code_are_part_of_the_key(section, monkeypatch):
    before = loaded(section)
    other = byte_tokenizer()
    other.chat_template += " "
    assert all(is_fresh(loaded(section, other)).values())
    assert all(is_fresh(loaded(section, hints=True)).values())
    assert all(is_fresh(loaded(section, privileged=False)).values())
    assert content(loaded(section)) == content(before)
    monkeypatch.setattr("megatron_hdpo.data.cache_key.rules_digest", lambda: "other code")
    assert all(is_fresh(loaded(section)).values())


def test_what_decides_nothing_is_not(section):
    loaded(section)
    section["train"][0]["weight"] = 3.0
    data = loaded(section | {"decontaminate": False, "seed": 5})
    assert is_fresh(data) == {"train": False, "eval": False}
    assert len(data.train) == len(ROWS)


def test_tokenizers_are_told_apart():
    assert tokenizer_digest(byte_tokenizer()) == tokenizer_digest(byte_tokenizer())
    assert tokenizer_digest(byte_tokenizer(chat=False)) != tokenizer_digest(byte_tokenizer())
    more = byte_tokenizer()
    more.add_tokens(["more"])
    assert tokenizer_digest(more) != tokenizer_digest(byte_tokenizer())


@pytest.mark.parametrize("damage", ["first byte", "middle", "last byte", "truncated", "empty"])
@pytest.mark.fault(
    "an entry in the cache of problems is damaged or cut",
    phase="start",
    seen="a warning; it is made again",
    lost="nothing",
)
def test_a_damaged_entry_is_said_and_made_again(section, caplog, damage):
    first = content(loaded(section))
    for file in cached_files(section):
        whole = bytearray(file.read_bytes())
        place = {"first byte": 0, "middle": len(whole) // 2, "last byte": -1}.get(damage, 0)
        whole[place] ^= 1
        file.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b""}.get(damage, whole))
    with caplog.at_level(logging.WARNING):
        again = loaded(section)
    assert content(again) == first
    assert all(is_fresh(again).values())
    assert sum("are damaged: removed, and made again" in text for text in caplog.messages) == 2
    assert not any(is_fresh(loaded(section)).values())


def problems(count: int, **metadata) -> CheckedProblems:
    made = [Problem(f"t/{i}", "t", f"question {i}", str(i), metadata=metadata) for i in range(count)]
    return CheckedProblems(made, question_hashes(made), LoadReport())


def test_one_of_many_makes_an_entry_and_the_others_wait_for_it(tmp_path):
    calls, found, ready = [], [], threading.Barrier(6)

    def make() -> CheckedProblems:
        calls.append(1)
        time.sleep(0.3)  # long enough that the others come to wait
        return problems(3)

    def process() -> None:
        ready.wait()
        found.append(ProblemCache(tmp_path).get("t", "key", make)[0])

    threads = [threading.Thread(target=process) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert [entry.problems for entry in found] == [problems(3).problems] * 6


def test_an_error_is_passed_on_and_stores_nothing(tmp_path):
    def make() -> CheckedProblems:
        raise DataError("a bad row")

    cache = ProblemCache(tmp_path)
    for _ in range(2):
        with pytest.raises(DataError, match="a bad row"):
            cache.get("t", "key", make)
    assert entries(tmp_path) == []
    assert cache.get("t", "key", lambda: problems(1))[1].fresh


def test_many_groups_of_rows_and_none(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_hdpo.data.cache_file.GROUP_ROWS", 4)
    for count in (0, 4, 11):
        ProblemCache(tmp_path).get("t", str(count), lambda count=count: problems(count))
        entry, origin = ProblemCache(tmp_path).get("t", str(count), lambda: pytest.fail("made again"))
        assert not origin.fresh
        assert entry.problems == problems(count).problems
        assert np.array_equal(entry.question_hashes, problems(count).question_hashes)
    assert gc.isenabled()


def test_a_folder_that_cannot_be_used_costs_time_only(section, tmp_path, caplog):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "problems").write_text("a file")
    data = loaded(section)
    assert str(data.origins["train"]) == "checked at this start, not cached"
    assert "cannot be cached" in caplog.text


@pytest.mark.parametrize("metadata", [{"pair": (1, 2)}, {1: "one"}, {"what": object()}, {"text": "half \ud800"}])
def test_metadata_that_would_not_come_back_equal_is_not_cached(tmp_path, caplog, metadata):
    made, origin = ProblemCache(tmp_path).get(
        "t",
        "key",
        lambda: dataclasses.replace(problems(1), problems=[Problem("t/0", "t", "q", "a", metadata=metadata)]),
    )
    assert made.problems[0].metadata is metadata
    assert origin.file is None
    assert "t/0: its metadata" in caplog.text
    assert list(tmp_path.glob("*.p*")) == []


def test_unused_entries_are_removed_and_used_ones_stay(tmp_path):
    cache, month = ProblemCache(tmp_path), time.time() - 31 * 86400
    for key in ("used", "unused"):
        cache.get("t", key, lambda: problems(1))
    (tmp_path / "t-left.partial").touch()
    for file in tmp_path.iterdir():
        os.utime(file, (month, month))
    cache.get("t", "used", lambda: pytest.fail("made again"))
    cache.get("t", "new", lambda: problems(1))
    assert [file.name.split("-")[1] for file in entries(tmp_path)] == ["new", "used"]
    assert not (tmp_path / "t-left.partial").exists()


def test_problems_that_depend_on_a_time_limit_are_tried_again_after_a_day(tmp_path):
    def make() -> CheckedProblems:
        return dataclasses.replace(problems(2), certain=False)

    cache = ProblemCache(tmp_path)
    assert [cache.get("t", "key", make)[1].fresh for _ in range(2)] == [True, False]
    (file,) = entries(tmp_path)
    yesterday = time.time() - 25 * 3600
    os.utime(file, (yesterday, yesterday))
    assert cache.get("t", "key", make)[1].fresh


def test_a_gold_answer_without_a_verdict_in_time_is_uncertain(tmp_path):
    task = JsonlTask(kind="jsonl", path=write(tmp_path / "a.jsonl", ROWS[:2]), on_bad_row="drop")
    late = {"0": GoldVerdict(None), "2": GoldVerdict("took too long", certain=False)}
    prompts = PromptBuilder(TOKENIZER, DataConfig.model_validate({"train": [task]}).prompts)
    checked = ProblemChecker(prompts, lambda answers: late).check(task)
    assert not checked.certain
    assert [problem.answer for problem in checked.problems] == ["0"]


class OwnTask(JsonlTask):
    """A task whose code is not this package's."""

    kind: Literal["own"] = "own"


def test_tasks_from_outside_and_unknown_tokenizers_have_no_key(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    checker = ProblemChecker(
        PromptBuilder(TOKENIZER, DataConfig(train=[JsonlTask(kind="jsonl", path=path)]).prompts), dict
    )
    assert task_key(JsonlTask(kind="jsonl", path=path), checker) is not None
    assert task_key(OwnTask(path=path), checker) is None
    slow = type("Slow", (), {"eos_token_id": 0, "unk_token_id": None, "all_special_tokens": []})()
    assert tokenizer_digest(slow) is None
