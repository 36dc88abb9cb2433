"""`megatron_hdpo compare`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_hdpo.commands.base import Command

_DESCRIPTION = """\
Prints pass@k at the last evaluation and at the best one with its 95 % interval,
steps and time, and the recipe keys in which the runs differ; draws their curves
over each other. Runs may still go on."""


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folders of runs")
    parser.add_argument(
        "--out", type=Path, default=Path("compare.png"), metavar="FILE", help="figure to write (default compare.png)"
    )


def _compare(arguments: argparse.Namespace) -> None:
    from megatron_hdpo.commands.compared_runs import load_runs, tables
    from megatron_hdpo.tracking.compare_plot import draw_comparison
    from megatron_hdpo.tracking.console import Console

    runs = load_runs(arguments.runs)
    console = Console(enabled=True)
    for table in tables(runs):
        console.table(table.title, table.rows)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_bytes(draw_comparison({name: records for name, (_, records) in runs.items()}))
    console.print(f"figure: {arguments.out}")


COMMAND = Command(
    "compare",
    "Compare runs in tables and one figure.",
    _add,
    _compare,
    description=_DESCRIPTION,
    examples=("runs/grpo runs/hdpo", "runs/seed-* --out seeds.png"),
)
