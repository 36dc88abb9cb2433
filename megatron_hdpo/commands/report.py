"""`megatron_hdpo report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_hdpo.commands.base import Command


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folders of runs, finished or not")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="folder to write to; of several runs, one folder in it each"
    )


def show_report(run: Path, out: Path | None = None) -> None:
    """Write the report of a run folder, into `out` where it is given, and show its tables."""
    from megatron_hdpo.tracking.console import Console
    from megatron_hdpo.tracking.report import write_report

    console = Console(enabled=True)
    with console.phase("report"):
        report = write_report(run, out)
    report.show(console)


def _report(arguments: argparse.Namespace) -> None:
    from megatron_hdpo.tracking.report import ReportError

    runs, out = arguments.runs, arguments.out
    names = [run.resolve().name for run in runs]
    if out is not None and len(set(names)) < len(names):
        raise ReportError(
            f"--out: several of the runs are called {max(names, key=names.count)}: report them one by one"
        )
    for run, name in zip(runs, names, strict=True):
        if len(runs) > 1:
            print(f"\n{run}")
        show_report(run, out if out is None or len(runs) == 1 else out / name)


COMMAND = Command(
    "report",
    "Write report.html and report.png, and print tables.",
    _add,
    _report,
    description="The files go into the folder of each run, or into --out. `compare` shows runs side by side.",
    examples=("runs/digit-sums", "runs/grpo runs/hdpo --out reports"),
)
