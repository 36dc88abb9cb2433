"""The report of a run folder: tables for the console, report.png, and report.html that needs no other file."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from megatron_hdpo.tracking.console import Console
from megatron_hdpo.tracking.metrics import METRICS_FILE, read_metrics
from megatron_hdpo.tracking.plots import draw_report
from megatron_hdpo.tracking.samples import pick_samples
from megatron_hdpo.tracking.summary import Records, SummaryTable, summarise
from megatron_hdpo.types.errors import UserError

RECIPE_FILE = "recipe.yaml"
ROLLOUTS_FOLDER = "rollouts"


class ReportError(UserError, ValueError):
    """A folder that no report can be made of; the message says which file or step is missing."""


@dataclass(frozen=True)
class Report:
    """The result of `write_report`: the tables, and the paths of the two files."""

    tables: list[SummaryTable]
    png: Path
    html: Path

    def show(self, console: Console) -> None:
        """Print the tables and the paths."""
        for table in self.tables:
            console.table(table.title, table.rows)
        console.print(f"report: {self.html} (figure: {self.png})")


def write_report(run_dir: str | Path, out: Path | None = None) -> Report:
    """Write `report.png` and `report.html` into `out`; works also while the run still goes on.

    out: default `run_dir`. They are made of its metrics.jsonl and, where they exist, recipe.yaml and rollouts/*.jsonl.
    Raises ReportError where `run_dir` is no run folder or has no finished step, MetricsFileError on a damaged record.
    """
    run = Path(run_dir)
    records = load_records(run)
    tables = summarise(records)
    png = draw_report(records)
    folder = run if out is None else out
    folder.mkdir(parents=True, exist_ok=True)
    report = Report(tables, png=folder / "report.png", html=folder / "report.html")
    report.png.write_bytes(png)
    report.html.write_text(_html(run, records, tables, png), encoding="utf-8")
    return report


def load_records(run: Path) -> Records:
    """Return the steps of a run folder. Raises ReportError where there are none."""
    if not run.is_dir():
        raise ReportError(f"{run}: no such folder; give the output folder of a run")
    if not (run / METRICS_FILE).exists():
        raise ReportError(f"{run}: no {METRICS_FILE} in it; give the output folder of a run that has made a step")
    records = read_metrics(run)
    if not records:
        raise ReportError(f"{run / METRICS_FILE}: no finished step in it yet; try again after the first one")
    return records


def _html(run: Path, records: Records, tables: list[SummaryTable], png: bytes) -> str:
    # Rollouts and recipes are text of models and people: everything is escaped, a missing variable is an error.
    loader = PackageLoader("megatron_hdpo.tracking")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    recipe = run / RECIPE_FILE
    samples, notes = pick_samples(run / ROLLOUTS_FOLDER)
    return environment.get_template("report.html.j2").render(
        name=run.resolve().name,
        first_step=records[0]["step"],
        last_step=records[-1]["step"],
        tables=tables,
        png=base64.b64encode(png).decode("ascii"),
        recipe=recipe.read_text(encoding="utf-8", errors="backslashreplace") if recipe.exists() else None,
        samples=samples,
        notes=notes,
    )
