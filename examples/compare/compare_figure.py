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
START = "warmed up"


def draw(rows: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> bytes:
    """Return the figure as a PNG.

    rows: those of `compare_results`. labels: of their columns; the columns of PANELS are drawn.
    """
    trained = [row for row in rows if row["method"] not in (START, "teacher")]
    start = next((row for row in rows if row["method"] == START), None)
    figure = Figure(figsize=(15, 1.9 + 2 * 0.27 * max(len(trained), 4)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, 4, sharey=True)
    for axes, (column, title) in zip(grid.flat, PANELS.items(), strict=True):
        assert column in labels
        _panel(axes, trained, column)
        axes.set_title(title, fontsize=10, fontweight="bold", loc="left")
        if start and (spread := start["summary"].get(column)):
            axes.axvspan(spread["low"], spread["high"], color=GREY, alpha=0.3, linewidth=0)
    grid[0, 0].set_ylim(len(trained) - 0.4, -0.6)  # shared; the first method on top
    for axes in grid[:, 0]:
        axes.set_yticks(range(len(trained)), [row["method"] for row in trained])
    note = "Dots: seeds; bars: their mean. Grey: before training. A seed that failed has no dot; red: all failed."
    figure.supxlabel(note, fontsize=9, color="#555555")
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
