"""docs/rewards.md says what is so: its tables are judged by the code, and the columns of others are filled in."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import compare_rewards
import pytest
from bench_rewards import math_verify_alone
from compare_rewards import BY_HAND, OTHERS, filled, rates, rows

from megatron_hdpo.rewards.math import GoldError, parse_gold, score_math

PAGE = Path(__file__).parents[2] / "docs" / "rewards.md"
LINES = PAGE.read_text(encoding="utf-8").splitlines()
ROWS = list(rows(LINES))


@pytest.mark.parametrize(("place", "row"), ROWS, ids=[f"{row.gold} {row.answer}" for _, row in ROWS])
def test_a_row_of_the_page_is_judged_as_it_says(place, row):
    assert (score_math(row.gold, rf"\boxed{{{row.answer}}}") == 1.0) is row.right
    assert LINES[place] == row.line()


def test_the_column_of_math_verify_is_what_it_says():
    """A new version of it may judge in another way: then `tools/compare_rewards.py` has to run again."""
    for _, row in ROWS:
        judged = filled(row, {"math-verify": math_verify_alone})
        assert row.others["math-verify"] == judged.others["math-verify"], (row.gold, row.answer)


def test_the_columns_of_others_are_filled_in(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(
        f"| {' | '.join(BY_HAND + OTHERS)} |\n{'|---' * 8}|\n| a | `5` | `7 @ 5` | no | | | no | yes |\n\n| b |\n"
    )
    monkeypatch.setattr(sys, "argv", ["compare_rewards.py", str(page)])
    compare_rewards.main()
    assert page.read_text().splitlines()[2] == "| a | `5` | `7 @ 5` | no | **yes** |  | no | yes |"


def test_the_table_is_whole():
    assert len({(row.gold, row.answer) for _, row in ROWS}) == len(ROWS) >= 60
    assert {row.right for _, row in ROWS} == {True, False}
    for _, row in ROWS:
        assert all(re.fullmatch(r"yes|no|none|\*\*(?:yes|no|none)\*\*", row.others[name]) for name in OTHERS), row


def test_the_rates_of_the_page_are_those_of_the_record():
    report = json.loads((PAGE.parents[1] / "benchmarks" / "rewards.json").read_text())
    made = rates(report)
    assert made and [line for line in LINES if line in made] == made


def test_golds_that_the_page_calls_refused_are_refused():
    table = "\n".join(LINES).partition("| refused | why |")[2].partition("\n\n")[0]
    refused = re.findall(r"^\| `(.+?)` \|", table, re.MULTILINE)
    assert len(refused) >= 4
    for gold in refused:
        with pytest.raises(GoldError):
            parse_gold(gold)
