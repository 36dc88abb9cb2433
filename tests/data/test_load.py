"""Loading a whole data section: gold checked, overlap removed, prompts that fit, nothing left out in silence."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from pydantic import ValidationError
from tiny_tokenizers import byte_tokenizer, character_tokenizer

from megatron_hdpo.data.config import DataConfig
from megatron_hdpo.data.load import default_cache_dir, load
from megatron_hdpo.rewards.config import RewardConfig
from megatron_hdpo.rewards.pool import RewardPool
from megatron_hdpo.types.errors import DataError

TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def pool():
    with RewardPool([], RewardConfig(workers=1)) as pool:
        yield pool


@pytest.fixture
def make(tmp_path, pool):
    def make(train, evaluation=(), task_keys=None, **config):
        def task(name, rows):
            path = tmp_path / f"{name}.jsonl"
            path.write_text("".join(json.dumps({"problem": q, "answer": a}) + "\n" for q, a in rows))
            return {"kind": "jsonl", "path": path} | (task_keys or {})

        section = {
            "train": [task("train", train)],
            "evaluation": [task("eval", evaluation)] if evaluation else [],
            "prompts": config.get("prompts", {}),
            "decontaminate": config.get("decontaminate", True),
            "cache_dir": tmp_path / "cache",
        }
        return load(DataConfig.model_validate(section), TOKENIZER, pool)

    return make


def test_training_problems_that_are_evaluated_on_are_left_out(make):
    train, evaluation = [("Is 1+1 two?", "1"), ("b", "2"), ("c", "3")], [("is $1 + 1$ two?", "1")]
    data = make(train, evaluation)
    assert [p.question for p in data.train] == ["b", "c"]
    assert data.report.counts == {"train": {"also evaluated on": 1}}
    assert data.report.kept == {"train": 2, "eval": 1}
    assert "train/1 is eval/1" in "\n".join(data.report.lines())
    assert len(make(train, evaluation, decontaminate=False).train) == 3
    assert {p.question for p in data.order.batch(0, 2)} == {"b", "c"}


def test_gold_that_cannot_be_parsed_names_its_line(make):
    rows = [("a", "1"), ("b", r"\frac{1}{2}"), ("c", "7 @ 5")]
    with pytest.raises(DataError, match=r"train\.jsonl:3: gold answer '7 @ 5' is not an expression.*on_bad_row"):
        make(rows)
    data = make(rows, task_keys={"on_bad_row": "drop"})
    assert [p.question for p in data.train] == ["a", "b"]
    assert data.report.counts["train"] == {"gold answer not readable": 1}
    assert len(make(rows, task_keys={"scorer": "exact"}).train) == 3


def test_problems_without_room_are_left_out_and_counted(make):
    rows = [("a", "1"), ("b" * 500, "2"), ("what is <|end|>?", "3")]
    data = make(rows, prompts={"max_prompt_tokens": 200, "max_privileged_tokens": 1000})
    assert [p.question for p in data.train] == ["a", "what is <|end|>?"]
    assert data.report.counts["train"] == {"prompt too long": 1} and data.report.escaped == {"train": 1}
    with pytest.raises(DataError, match=r"'train' has no problem left .*3 left out, prompt too long .*tokens"):
        make([(q, a) for q, a in rows if "end" not in q] + [("c", "4")], prompts={"max_prompt_tokens": 10})


@pytest.mark.parametrize("policy", ["error", "drop"])
def test_rows_that_the_tokenizer_has_no_token_for_are_found_at_load(policy, tmp_path, pool):
    """Those of privileged prompts too, which are asked for only at a cliff."""
    path = tmp_path / "rows.jsonl"
    rows = [{"problem": f"{n}+1=", "answer": str(n + 1), "solution": str(n + 1)} for n in range(120)]
    rows[110]["solution"] = "it is 111"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = DataConfig.model_validate(
        {
            "train": [{"kind": "jsonl", "path": path, "on_bad_row": policy}],
            "prompts": {"chat": False, "student": "{{ question }}", "privileged": "{{ solution }}#{{ question }}"},
            "cache_dir": tmp_path / "cache",
        }
    )
    tokenizer = character_tokenizer("0123456789+=#\\boxed{}\n")
    if policy == "error":
        with pytest.raises(DataError, match=r"rows\.jsonl:111: the tokenizer has no token .* on_bad_row: drop"):
            load(section, tokenizer, pool)
        return
    data = load(section, tokenizer, pool)
    assert data.report.counts == {"rows": {"no token": 1}} and len(data.train) == 119
    assert len(load(section, tokenizer, pool, privileged=False).train) == 120


def test_nothing_left_after_decontamination_is_an_error(make):
    with pytest.raises(DataError, match=r"task 'train' has no problem left .*also evaluated on"):
        make([("a", "1")], [("a", "1")])


def test_weights_of_tasks_reach_the_order():
    config = {
        "train": [
            {"kind": "digit_sums", "name": "short", "lengths": [2], "size": 60, "weight": 3},
            {"kind": "digit_sums", "name": "long", "lengths": [6], "size": 60, "weight": 1},
        ],
        "prompts": {"chat": False, "student": "{{ question }}", "privileged": "{{ solution }};{{ question }}"},
    }
    data = load(DataConfig.model_validate(config), byte_tokenizer(chat=False))
    assert [p.task for p in data.order.batch(0, 16)].count("short") == 12
    assert TOKENIZER.decode(data.prompts.privileged_prompt(data.train[0])).endswith(data.train[0].question)
    assert set(data.tasks) == {"short", "long"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"train": []}, "at least 1 item"),
        ({"train": [{"kind": "digit_sums", "lengths": [3]}] * 2}, "several tasks are called digit_sums"),
        (
            {"train": [{"kind": "digit_sums", "lengths": [3]}], "evaluation": [{"kind": "digit_sums", "lengths": [4]}]},
            "give each its own `name`",
        ),
        ({"train": [{"kind": "digit_sums", "lengths": [3]}], "seeds": 1}, "Extra inputs"),
    ],
)
def test_wrong_sections_are_refused(config, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate(config)


@pytest.mark.skipif("MEGATRON_HDPO_DATA" not in os.environ, reason="MEGATRON_HDPO_DATA does not name the data folder")
def test_real_sets_load(tmp_path):
    folder = Path(os.environ["MEGATRON_HDPO_DATA"])
    config = {
        "train": [{"kind": "jsonl", "path": folder / "gsm8k_test.jsonl"}],
        "evaluation": [{"kind": "jsonl", "path": folder / "math500.jsonl", "on_bad_row": "drop"}],
        "prompts": {"max_prompt_tokens": 4096},
        "cache_dir": tmp_path,
    }
    data = load(DataConfig.model_validate(config), TOKENIZER)
    assert len(data.train) == 1319 and 495 < len(data.evaluation) <= 500
    assert data.report.counts.keys() <= {"math500"}


def test_every_problem_is_encoded_and_not_the_first_ones_alone(tmp_path, pool):
    path = tmp_path / "rows.jsonl"
    rows = [{"problem": f"{i}+{i}=", "answer": "1", "solution": "0"} for i in range(150)]
    rows[130]["solution"] = "x"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = character_tokenizer("0123456789+=\n\\boxed{}#")
    section = {
        "train": [{"kind": "jsonl", "path": path}],
        "prompts": {"chat": False, "student": "{{ question }}", "privileged": "{{ solution }}#{{ question }}"},
        "cache_dir": tmp_path / "cache",
    }
    config = DataConfig.model_validate(section)
    assert len(load(config, tokenizer, pool).train) == 150  # x is in "boxed"
    rows[130]["solution"] = "y"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"rows\.jsonl:131: the tokenizer has no token"):
        load(config, tokenizer, pool)


def test_a_token_beyond_the_model_is_found_in_every_problem(tmp_path, pool):
    path = tmp_path / "rows.jsonl"
    rows = [{"problem": f"question {i}", "answer": "1"} for i in range(150)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"problem": "a zebra", "answer": "1"}]))
    tokenizer = byte_tokenizer()
    size = len(tokenizer.get_vocab())
    tokenizer.add_tokens(["zebra"])
    config = DataConfig.model_validate({"train": [{"kind": "jsonl", "path": path}], "cache_dir": tmp_path / "cache"})
    assert len(load(config, tokenizer, pool).train) == 151
    with pytest.raises(DataError, match=rf"rows\.jsonl:151: token {size} \('zebra'\) .* beyond the model's vocabulary"):
        load(config, tokenizer, pool, vocab_size=size)


def test_a_user_without_a_home_folder(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(DataError, match=r"set data\.cache_dir, HOME or XDG_CACHE_HOME"):
        default_cache_dir()
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/megatron_hdpo")
