"""Tables of several runs: held-out pass@k at the end and at best, steps and time, and what their recipes differ in."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_hdpo.config.file import leaves
from megatron_hdpo.tracking.formats import duration
from megatron_hdpo.tracking.names import step_seconds
from megatron_hdpo.tracking.report import RECIPE_FILE, ReportError, load_records
from megatron_hdpo.tracking.summary import Records, SummaryTable, evaluations, series

UNLIKE_BY_NATURE = ("output",)
"""Keys that differ between any two runs."""


def load_runs(folders: Sequence[Path]) -> dict[str, tuple[Path, Records]]:
    """Return folder and records of each run by a short name. Raises ReportError where a folder is no run."""
    last = [folder.resolve().name for folder in folders]
    names = [name if last.count(name) == 1 else str(folder) for name, folder in zip(last, folders, strict=True)]
    if len(set(names)) < len(names):
        raise ReportError(f"{', '.join(map(str, folders))}: a run is given twice")
    return {name: (folder, load_records(folder)) for name, folder in zip(names, folders, strict=True)}


def tables(runs: Mapping[str, tuple[Path, Records]]) -> list[SummaryTable]:
    """Return the tables, with a column per run."""
    records = {name: of_run for name, (_, of_run) in runs.items()}
    recipes = {name: _recipe(folder) for name, (folder, _) in runs.items()}
    found = [
        SummaryTable("Held-out pass@k with its 95 % interval (the best of many favours luck)", _pass(records)),
        SummaryTable("Steps and time", _length(records)),
        SummaryTable("Recipe keys that differ", _differing(recipes)),
    ]
    return [table for table in found if table.rows]


def _pass(runs: Mapping[str, Records]) -> list[dict[str, str]]:
    metrics = sorted({item for records in runs.values() for item in evaluations(records)}, key=lambda item: item[1:])
    rows = []
    for metric, dataset, k in metrics:
        start = {"set": dataset or "held-out", "metric": f"pass@{k}"}
        rows.append(start | {"at": "last"} | {name: _last(records, metric) for name, records in runs.items()})
        rows.append(start | {"at": "best"} | {name: _best(records, metric) for name, records in runs.items()})
    return rows


def _last(records: Records, metric: str) -> str:
    steps, _ = series(records, metric)
    return _at(records, metric, steps[-1]) if steps else "-"


def _best(records: Records, metric: str) -> str:
    steps, values = series(records, metric)
    return _at(records, metric, steps[values.index(max(values))]) if steps else "-"


def _at(records: Records, metric: str, step: int) -> str:
    """Return a value with its interval and step: `0.417 (0.245 to 0.612), step 40`."""
    record = next(record for record in records if record["step"] == step)
    low, high = record.get(f"{metric}_low"), record.get(f"{metric}_high")
    interval = "" if low is None or high is None else f" ({low:.3f} to {high:.3f})"
    return f"{record[metric]:.3f}{interval}, step {step}"


def _length(runs: Mapping[str, Records]) -> list[dict[str, str]]:
    def row(what: str, cells: Mapping[str, str]) -> dict[str, str]:
        return {"": what, **cells}

    seconds = {
        name: [s for r in records if r["step"] > 0 and (s := step_seconds(r)) is not None]
        for name, records in runs.items()
    }
    rewards = {name: series(records, "rollout/reward_mean")[1] for name, records in runs.items()}
    return [
        row("last step", {name: str(records[-1]["step"]) for name, records in runs.items()}),
        row("time of all steps", {name: duration(math.fsum(s)) if s else "-" for name, s in seconds.items()}),
        row("seconds per step, median", {n: f"{statistics.median(s):.2f}" if s else "-" for n, s in seconds.items()}),
        row("mean reward, last step", {name: f"{r[-1]:.3f}" if r else "-" for name, r in rewards.items()}),
    ]


def _recipe(folder: Path) -> dict[str, Any] | None:
    """Return the keys of a run's recipe; None where the folder has none. Raises ReportError for a damaged one."""
    path = folder / RECIPE_FILE
    if not path.is_file():
        return None
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ReportError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ReportError(f"{path}: holds no recipe; restore it, or remove it to compare without recipes")
    return dict(leaves(tree))


def _differing(recipes: Mapping[str, Mapping[str, Any] | None]) -> list[dict[str, str]]:
    known = [recipe for recipe in recipes.values() if recipe is not None]
    rows = []
    for key in dict.fromkeys(key for recipe in known for key in recipe):
        cells = {name: "no recipe" if r is None else str(r.get(key, "-")) for name, r in recipes.items()}
        if key not in UNLIKE_BY_NATURE and len({str(recipe.get(key, "-")) for recipe in known}) > 1:
            rows.append({"key": key, **cells})
    return rows
