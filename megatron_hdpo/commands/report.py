"""`megatron_hdpo report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_hdpo.commands.base import Command


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="output folder of a run, finished or not")


def show_report(folder: Path) -> None:
    """Write the report of a run folder and show its tables."""
    from megatron_hdpo.tracking.console import Console
    from megatron_hdpo.tracking.report import write_report

    write_report(folder).show(Console(enabled=True))


def _report(arguments: argparse.Namespace) -> None:
    show_report(arguments.run_dir)


COMMAND = Command(
    "report",
    "Write report.html and report.png of a run and print its tables.",
    _add,
    _report,
    examples=("runs/digit-sums",),
)
