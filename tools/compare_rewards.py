r"""Fill in the verdicts of others in the tables of docs/rewards.md: math-verify alone, verl's functions, TRL's.

    python tools/compare_rewards.py --verl VERL --trl TRL docs/rewards.md

VERL and TRL are copies of the repositories; without one, its columns stay as they are. A verdict that is not the one
that the page gives is set in bold. The columns after `right?` belong to this tool, the others are written by hand and
held against the code by tests/tools/test_rewards_page.py.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _environment  # noqa: F401
from _published_rewards import Judge, quietly, trl, verl
from bench_rewards import PER, math_verify_alone

BY_HAND = ["rule", "gold", "answer", "right?"]
OTHERS = ["math-verify", "verl, MATH", "verl, DAPO", "TRL"]


@dataclass(frozen=True)
class Row:
    """A row of a table of verdicts. others: cells by the column's name."""

    rule: str
    gold: str
    answer: str
    right: bool
    others: Mapping[str, str]

    def line(self) -> str:
        """Return the row as it stands in the page."""
        cells = [self.rule, f"`{self.gold}`", f"`{self.answer}`", _word(self.right), *map(self.others.get, OTHERS)]
        return f"| {' | '.join(cell or '' for cell in cells)} |"


def main() -> None:
    """Rewrite the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--verl", type=Path, metavar="REPOSITORY")
    parser.add_argument("--trl", type=Path, metavar="REPOSITORY")
    options = parser.parse_args()
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns once for each formula that it does not read
    judges: dict[str, Judge] = {"math-verify": math_verify_alone}
    judges |= verl(options.verl) if options.verl else {}
    judges |= trl(options.trl) if options.trl else {}
    lines = options.page.read_text(encoding="utf-8").splitlines()
    for place, row in rows(lines):
        lines[place] = filled(row, judges).line()
    options.page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def rows(lines: list[str]) -> Iterator[tuple[int, Row]]:
    """Yield the rows of the tables of verdicts with the places of their lines."""
    inside = False
    for place, line in enumerate(lines):
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells == BY_HAND + OTHERS:
            inside = True
        elif not cells:
            inside = False
        elif inside and set(line) - set("|-: "):
            yield place, _row(cells, place + 1)


def rates(report: dict[str, Any]) -> list[str]:
    """Return the rows of the page's table of errors, from a report of bench_rewards.py."""
    lines = []
    for name, found in report["sets"].items():
        cells = [name, str(found["golds"]), str(found["refused"])]
        for part in ("other_spellings", "wrong_answers"):
            errors = [f"{found[part][judge][f'per_{PER}']:.0f}" for judge in ("ours", "math_verify")]
            cells += [f"{found[part]['pairs']:,}", *errors]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _row(cells: list[str], line: int) -> Row:
    rule, gold, answer, right, *others = cells
    if (
        len(others) != len(OTHERS)
        or right not in ("yes", "no")
        or not all(re.fullmatch("`.+`", c) for c in (gold, answer))
    ):
        raise SystemExit(f"line {line} is no row of {BY_HAND + OTHERS}")
    return Row(rule, gold[1:-1], answer[1:-1], right == "yes", dict(zip(OTHERS, others, strict=True)))


def filled(row: Row, judges: Mapping[str, Judge]) -> Row:
    """Return the row with the verdicts of the judges."""
    found = {name: quietly(judge, row.gold, row.answer) for name, judge in judges.items()}
    cells = {
        name: _word(verdict) if verdict is row.right else f"**{_word(verdict)}**" for name, verdict in found.items()
    }
    return Row(row.rule, row.gold, row.answer, row.right, {**row.others, **cells})


def _word(verdict: bool | None) -> str:
    return {True: "yes", False: "no", None: "none"}[verdict]


if __name__ == "__main__":
    main()
