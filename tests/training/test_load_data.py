"""Loading on several ranks: one of them checks, the others read its cache, and all hold the same problems."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from distributed_helper import run_ranks
from thread_ranks import World
from tiny_tokenizers import byte_tokenizer

from megatron_hdpo.data.config import DataConfig
from megatron_hdpo.data.load import load
from megatron_hdpo.training.load_data import check_same
from megatron_hdpo.types.errors import DataError
from megatron_hdpo.types.problem import Problem


def load_on_a_rank(folder: str) -> tuple[bool, list[str]]:
    section = {"train": [{"kind": "jsonl", "path": f"{folder}/rows.jsonl"}], "cache_dir": f"{folder}/cache"}
    data = load(DataConfig.model_validate(section), byte_tokenizer())
    return data.origins["rows"].fresh, [f"{problem} {problem.metadata}" for problem in data.train]


def test_one_rank_checks_and_the_others_read_its_cache(tmp_path: Path) -> None:
    rows = [{"problem": f"What is {i}+{i}?", "answer": str(2 * i)} for i in range(2000)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = run_ranks(3, load_on_a_rank, str(tmp_path))
    assert sorted(fresh for fresh, _ in loaded) == [False, False, True]
    assert loaded[0][1] == loaded[1][1] == loaded[2][1]
    assert len(loaded[0][1]) == len(rows)


@dataclass
class Data:
    train: list[Problem]
    evaluation: list[Problem]


def check_on_threads(others: list[Problem]) -> list[str]:
    mine = Data([Problem("a/1", "a", "q", "1"), Problem("a/2", "a", "r", "2")], [])

    def check(context) -> str:
        try:
            check_same(Data(others, []) if context.rank == 2 else mine, context)
        except DataError as error:
            return str(error)
        return "same"

    return World(3).run(check)


@pytest.mark.parametrize("question", ["other", None])
def test_ranks_with_other_problems_are_named_on_every_rank(question: str | None) -> None:
    others = [Problem("a/1", "a", "q", "1")] + ([Problem("a/2", "a", question, "2")] if question else [])
    found = check_on_threads(others)
    assert len(set(found)) == 1
    assert found[0].startswith(f"data: rank 0 has 2 problems, rank 2 has {len(others)}, and they are not the same: ")


def test_ranks_with_the_same_problems_pass() -> None:
    assert check_on_threads([Problem("a/1", "a", "q", "1"), Problem("a/2", "a", "r", "2")]) == ["same"] * 3
