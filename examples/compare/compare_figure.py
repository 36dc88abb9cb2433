"""Figure of the comparison: one panel per column, one bar per method, one dot per seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import _part  # noqa: F401
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_hdpo.tracking.plots import BLUE, GREY, RED

PANELS = {
    "hard_pass@8": "Hard sums, pass@8",
    "hard_pass@1": "Hard sums, pass@1",
    "easy_pass@8": "Taught sums, pass@8",
    "easy_pass@1": "Taught sums, pass@1",
    "entropy": "Entropy (nats per token)",
    "response_tokens": "Response (tokens)",
    "step_seconds": "Seconds per step",
    "signal": "Share of groups with signal",
}
HEADLINE = ("hard_pass@8", "easy_pass@8")
NOTE = "Dots: seeds; bars: their mean. Grey: before training. A seed that failed has no dot; red: all failed."
START = "warmed up"


def draw(rows: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> bytes:
    """Return the figure as a PNG.

    rows: those of `compare_results`. labels: of their columns; the columns of PANELS are drawn.
    """
    assert set(PANELS) <= set(labels)
    return _figure(rows, _trained(rows), list(PANELS), lines=2)


def headline(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return, as a PNG, the panels that say most, the methods ordered by the first of them."""
    first = HEADLINE[0]
    best_first = sorted(_trained(rows), key=lambda row: row["summary"].get(first, {"mean": -1})["mean"], reverse=True)
    return _figure(rows, best_first, HEADLINE, lines=1)


def _trained(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["method"] not in (START, "teacher")]


def _figure(
    rows: Sequence[Mapping[str, Any]], trained: Sequence[Mapping[str, Any]], columns: Sequence[str], lines: int
) -> bytes:
    start = next((row for row in rows if row["method"] == START), None)
    across = len(columns) // lines
    size = (1 + 3.5 * across, 0.95 + lines * (0.475 + 0.27 * max(len(trained), 4)))
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, across, sharey=True, squeeze=False)
    for axes, column in zip(grid.flat, columns, strict=True):
        _panel(axes, trained, column)
        axes.set_title(PANELS[column], fontsize=10, fontweight="bold", loc="left")
        if start and (spread := start["summary"].get(column)):
            axes.axvspan(spread["low"], spread["high"], color=GREY, alpha=0.3, linewidth=0)
    grid[0, 0].set_ylim(len(trained) - 0.4, -0.6)  # shared; the first method on top
    for axes in grid[:, 0]:
        axes.set_yticks(range(len(trained)), [row["method"] for row in trained])
    figure.supxlabel(NOTE, fontsize=9, color="#555555")
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _panel(axes: Axes, rows: Sequence[Mapping[str, Any]], column: str) -> None:
    for place, row in enumerate(rows):
        values = [run[column] for run in row["runs"].values() if column in run]
        if not values:
            axes.text(0.02, place, "failed", color=RED, va="center", transform=axes.get_yaxis_transform())
            continue
        axes.barh(place, sum(values) / len(values), color=BLUE, alpha=0.35, height=0.7)
        axes.plot(values, [place] * len(values), "o", color=BLUE, markersize=3.5)
    axes.set_xlim(left=0)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
