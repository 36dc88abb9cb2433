"""The final tables of a run: evaluation before and after, training metrics, time per phase."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_hdpo.tracking.names import (
    HEADLINES,
    SERVER_TROUBLE,
    SERVER_USE,
    SERVERS,
    STEP_SECONDS,
    parse_accuracy,
    parse_pass_at,
    parse_phase,
    step_seconds,
)

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class SummaryTable:
    """A title and rows with the same keys; every cell is text ready to print."""

    title: str
    rows: list[dict[str, str]]


def summarise(records: Records) -> list[SummaryTable]:
    """Return tables of evaluation, training, seconds per phase and SGLang servers, without empty ones.

    records: the steps of `read_metrics`. A metric that is absent or null in a step does not count in its mean.
    """
    with_servers = [record for record in records if record.get(SERVERS)]
    tables = [
        SummaryTable("Evaluation", _evaluation(records)),
        SummaryTable("Accuracy by level and source", _accuracy(records)),
        SummaryTable("Training", _training(records)),
        SummaryTable("Time per phase (seconds)", _time(records)),
        SummaryTable("Servers", _server_use(with_servers)),
        SummaryTable("Trouble with servers", _server_trouble(with_servers)),
    ]
    return [table for table in tables if table.rows]


def series(records: Records, name: str) -> tuple[list[int], list[float]]:
    """Return (steps, values) of a metric, only where it is a number."""
    points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return [step for step, _ in points], [float(value) for _, value in points]


def evaluations(records: Records) -> list[tuple[str, str, int]]:
    """Return (metric, evaluation set, k) of every pass@k, by set and k. The set of plain `eval/pass@k` is ""."""
    names = {name for record in records for name in record}
    found = [(name, *parsed) for name in names if (parsed := parse_pass_at(name)) is not None]
    return sorted(found, key=lambda item: item[1:])


def phases(records: Records) -> list[tuple[str, str]]:
    """Return (metric, phase) of every `time/<phase>_s` except the step's total, the longest total first."""
    names = {name for record in records for name in record}
    found = [(name, phase) for name in names if (phase := parse_phase(name)) is not None]
    return sorted(found, key=lambda item: (-math.fsum(series(records, item[0])[1]), item[1]))


def _evaluation(records: Records) -> list[dict[str, str]]:
    found = [(name, dataset or "held-out", f"pass@{k}") for name, dataset, k in evaluations(records)]
    return [row for item in found if (row := _course(records, *item))]


def _accuracy(records: Records) -> list[dict[str, str]]:
    names = dict.fromkeys(name for record in records for name in record)  # in the order in which they were measured
    found = [(name, *parsed) for name in names if (parsed := parse_accuracy(name)) is not None]
    return [row for item in found if (row := _course(records, *item))]


def _course(records: Records, name: str, dataset: str, metric: str) -> dict[str, str]:
    """Return the row of a rate: before, after, and the largest value with the first step that had it; {} if absent."""
    steps, values = series(records, name)
    if not steps:
        return {}
    once, intervals = len(steps) == 1, _intervals(records, name)
    best = values.index(max(values))
    return {
        "set": dataset,
        "metric": metric,
        "before": f"{values[0]:.3f}{intervals.get(steps[0], '')}",
        "after": "-" if once else f"{values[-1]:.3f}{intervals.get(steps[-1], '')}",
        "change": "-" if once else f"{values[-1] - values[0]:+.3f}",
        "best": "-" if once else f"{values[best]:.3f}{intervals.get(steps[best], '')} at step {steps[best]}",
        "steps": str(steps[0]) if once else f"{steps[0]} to {steps[-1]}",
    }


def _intervals(records: Records, name: str) -> dict[int, str]:
    """Return ` (low to high)` by step, for the steps that have the interval of a metric."""
    low, high = (dict(zip(*series(records, f"{name}_{end}"), strict=True)) for end in ("low", "high"))
    return {step: f" ({low[step]:.3f} to {high[step]:.3f})" for step in low.keys() & high.keys()}


def _training(records: Records) -> list[dict[str, str]]:
    rows = []
    for headline in HEADLINES:
        _, values = series(records, headline.name)
        if values:
            cells = (values[0], values[-1], math.fsum(values) / len(values))
            first, last, mean = (format(value, headline.spec) for value in cells)
            row = {"metric": headline.label, "first": first, "last": last, "mean": mean, "steps": str(len(values))}
            rows.append(row)
    return rows


def _time(records: Records) -> list[dict[str, str]]:
    total = math.fsum(step_seconds(record) or 0.0 for record in records)
    rows = [_time_row(phase, series(records, name)[1], total) for name, phase in phases(records)]
    _, steps = series(records, STEP_SECONDS)
    return [row for row in (*rows, _time_row("whole step", steps, total)) if row]


def _time_row(label: str, seconds: Sequence[float], total: float) -> dict[str, str]:
    if not seconds:
        return {}
    whole = math.fsum(seconds)
    return {
        "phase": label,
        "first": f"{seconds[0]:,.2f}",
        "last": f"{seconds[-1]:,.2f}",
        "mean": f"{whole / len(seconds):,.2f}",
        "total": f"{whole:,.1f}",
        "share": f"{whole / total:.1%}" if total else "-",
    }


def _server_use(records: Records) -> list[dict[str, str]]:
    rows = []
    for metric in SERVER_USE:
        steps, values = series(records, metric.name)
        if not values:
            continue
        cells = {"mean": math.fsum(values) / len(values), "last": values[-1]}
        row = {key: format(value, metric.spec) for key, value in cells.items()}
        for key, extreme in (("lowest", min(values)), ("highest", max(values))):
            row[key] = f"{extreme:{metric.spec}} (step {steps[values.index(extreme)]})"
        rows.append({"metric": metric.label, **row})
    return rows


def _server_trouble(records: Records) -> list[dict[str, str]]:
    rows = []
    for metric in SERVER_TROUBLE:
        steps, values = series(records, metric.name)
        if not values:
            continue
        worst = max(values)
        rows.append(
            {
                "what": metric.label,
                "total": format(math.fsum(values), metric.spec),
                "steps": f"{sum(value > 0 for value in values)} of {len(values)}",
                "most": f"{worst:{metric.spec}} (step {steps[values.index(worst)]})" if worst else "-",
            }
        )
    return rows
