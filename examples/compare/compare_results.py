"""Results of the comparison: numbers and their spread over seeds, as JSON, table and figure."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import _part  # noqa: F401
from compare_figure import draw, headline
from compare_run import SIGNAL
from rich.console import Console
from rich.table import Table

from megatron_hdpo.tracking.metrics import read_metrics

HARD = ("n6", "n7", "n8")
REFERENCE = "grpo"
LABELS = {
    "easy_pass@1": "easy pass@1",
    "easy_pass@8": "easy pass@8",
    "hard_pass@1": "hard pass@1",
    "hard_pass@8": "hard pass@8",
    "entropy": "entropy",
    "response_tokens": "tokens",
    "step_seconds": "s/step",
    "signal": "signal",
    "samples": "samples/step",
}
"""Columns and their labels; `measured` documents each column."""


@dataclass(frozen=True)
class Outcome:
    """A run's folder, and the reason if it failed."""

    folder: Path
    failure: str | None


@dataclass(frozen=True)
class Setting:
    """Settings of the runs. seconds_of_last_call: excludes runs that were complete before it."""

    seeds: list[int]
    steps: int
    jobs: int
    seconds_of_last_call: float


Row = dict[str, Any]
"""method; runs: by seed, numbers or {"failed": reason}; summary: mean, low and high by column, of the runs that did
not fail; failed: how many did."""


def write_results(
    out: Path,
    given: Mapping[tuple[str, int], Outcome],
    outcomes: Mapping[tuple[str, int], Outcome],
    setting: Setting,
    console: Console,
) -> None:
    """Write compare.json, compare.md, compare.png and headline.png into `out` and print the table.

    given: the runs that the methods start from or learn from, which are only evaluated.
    """
    rows = [*_rows(given, trained=False), *_rows(outcomes, trained=True)]
    machine = f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}, Python {platform.python_version()}"
    (out / "compare.json").write_text(
        json.dumps({"setting": asdict(setting), "machine": machine, "rows": rows}, indent=1) + "\n"
    )
    (out / "compare.md").write_text(markdown(rows))
    (out / "compare.png").write_bytes(draw(rows, LABELS))
    (out / "headline.png").write_bytes(headline(rows))
    console.print(_table(rows))
    console.print(f"{out}/compare.json, compare.md, compare.png, headline.png")


def measured(folder: Path, trained: bool) -> dict[str, float]:
    """Return the numbers of a run.

    Evaluation after the last step. Entropy (the mean negative log-prob of sampled tokens, nats) and response tokens of
    the rollouts of the last quarter of the steps. Median seconds of a step without evaluation and saving. Share of
    groups with signal, and rollouts per step, privileged ones included, over all steps.

    Raises KeyError where a metric is missing and ValueError where one is not a finite number.
    """
    records = read_metrics(folder)
    last = records[-1]
    numbers = {f"easy_pass@{k}": last[f"eval/n3/pass@{k}"] for k in (1, 8)}
    numbers |= {f"hard_pass@{k}": statistics.fmean(last[f"eval/{n}/pass@{k}"] for n in HARD) for k in (1, 8)}
    if trained:
        records = [record for record in records if record["step"] > 0]  # step 0 has only the health checks
        end = records[-max(1, len(records) // 4) :]
        numbers["entropy"] = statistics.fmean(record["rollout/nll"] for record in end)
        numbers["response_tokens"] = statistics.fmean(record["rollout/response_tokens"] for record in end)
        numbers["step_seconds"] = statistics.median(_step_seconds(record) for record in records)
        numbers["signal"] = statistics.fmean(record[SIGNAL] for record in records)
        rollouts = [record["rollout/samples"] + record.get("privileged/rollouts", 0.0) for record in records]
        numbers["samples"] = statistics.fmean(rollouts)
    if bad := [name for name, value in numbers.items() if not math.isfinite(value)]:
        raise ValueError(f"not a finite number: {', '.join(bad)}")
    return numbers


def _step_seconds(record: Mapping[str, float]) -> float:
    return record["time/step_s"] - sum(record.get(f"time/{phase}_s", 0.0) for phase in ("evaluate", "save"))


def _rows(outcomes: Mapping[tuple[str, int], Outcome], trained: bool) -> list[Row]:
    names = dict.fromkeys(name for name, _ in outcomes)
    return [_row(name, {s: o for (n, s), o in outcomes.items() if n == name}, trained) for name in names]


def _row(name: str, by_seed: Mapping[int, Outcome], trained: bool) -> Row:
    runs: dict[str, dict[str, Any]] = {}
    for seed, outcome in by_seed.items():
        try:
            runs[str(seed)] = {"failed": outcome.failure} if outcome.failure else measured(outcome.folder, trained)
        except (LookupError, TypeError, ValueError, OSError) as error:
            runs[str(seed)] = {"failed": f"{type(error).__name__}: {error}"}
    good = [run for run in runs.values() if "failed" not in run]
    columns = [column for column in LABELS if good and column in good[0]]
    summary = {column: _spread([run[column] for run in good]) for column in columns}
    return {"method": name, "runs": runs, "summary": summary, "failed": len(runs) - len(good)}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "low": min(values), "high": max(values)}


def markdown(rows: Sequence[Row]) -> str:
    """Return the table, and which methods are outside the reference's spread on the hard sums."""
    header = ["method", *LABELS.values()]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(cells) + " |" for cells in map(_cells, rows)]
    failed = [(r["method"], seed, run["failed"]) for r in rows for seed, run in r["runs"].items() if "failed" in run]
    lines += [f"\n{method}, seed {seed}, failed: {reason}" for method, seed, reason in failed]
    return "\n".join([*lines, *(f"\n{line}" for line in against_reference(rows, "hard_pass@8"))]) + "\n"


def against_reference(rows: Sequence[Row], column: str) -> list[str]:
    """Return which methods are above, below or within GRPO's range over seeds in a column; empty without GRPO."""
    spreads = {
        row["method"]: row["summary"][column] for row in rows if "signal" in row["summary"] and not row["failed"]
    }
    if REFERENCE not in spreads:
        return []
    low, high = spreads[REFERENCE]["low"], spreads[REFERENCE]["high"]
    above = [name for name, spread in spreads.items() if spread["low"] > high]
    below = [name for name, spread in spreads.items() if spread["high"] < low]
    within = [name for name in spreads if name not in (*above, *below, REFERENCE)]
    return [
        f"{LABELS[column]}, {what} {REFERENCE}: {', '.join(names) or 'none'}"
        for what, names in (
            ("every seed above every seed of", above),
            ("every seed below every seed of", below),
            ("ranges that overlap that of", within),
        )
    ]


def _cells(row: Row) -> list[str]:
    failed = f"{row['failed']} of {len(row['runs'])} failed"
    name = row["method"] + (f" ({failed})" if row["failed"] else "")
    return [name, *(_cell(row["summary"].get(column), row) for column in LABELS)]


def _cell(spread: Mapping[str, float] | None, row: Row) -> str:
    if spread is None:
        return "failed" if row["failed"] == len(row["runs"]) else "-"
    digits = 0 if spread["mean"] >= 100 else 1 if spread["mean"] >= 10 else 2
    mean, low, high = (f"{spread[name]:.{digits}f}" for name in ("mean", "low", "high"))
    return mean if len(row["runs"]) == 1 else f"{mean} ({low}-{high})"


def _table(rows: Sequence[Row]) -> Table:
    table = Table("method", title="Mean (lowest-highest seed)")
    for label in LABELS.values():
        table.add_column(label, justify="right")
    for row in rows:
        table.add_row(*_cells(row))
    return table
