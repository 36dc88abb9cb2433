"""The figure of `megatron_hdpo compare`: the curves of several runs over each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from io import BytesIO

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_hdpo.tracking.plot_parts import running_mean
from megatron_hdpo.tracking.plots import COLORS, SMOOTH_FROM, STYLES
from megatron_hdpo.tracking.summary import Records, evaluations, series

_COLUMNS = 3


def draw_comparison(runs: Mapping[str, Records]) -> bytes:
    """Return a PNG with the reward and the lowest and highest pass@k of each evaluation set; bands: 95 % intervals."""
    panels = {"Mean reward of the rollouts": "rollout/reward_mean"} | _pass_panels(runs)
    rows = math.ceil(len(panels) / _COLUMNS)
    figure = Figure(figsize=(4.6 * min(len(panels), _COLUMNS), 3.2 * rows + 0.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, min(len(panels), _COLUMNS), squeeze=False)
    for axes, (title, metric) in zip(grid.flat, panels.items(), strict=False):
        _panel(axes, title, metric, runs)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _pass_panels(runs: Mapping[str, Records]) -> dict[str, str]:
    """Return title and metric of the panels of pass@k."""
    found = {item for records in runs.values() for item in evaluations(records)}
    by_set: dict[str, dict[int, str]] = {}
    for name, dataset, k in sorted(found, key=lambda item: item[1:]):
        by_set.setdefault(dataset, {})[k] = name
    return {
        f"{dataset or 'held-out'}, pass@{k}": names[k]
        for dataset, names in by_set.items()
        for k in sorted({min(names), max(names)})
    }


def _panel(axes: Axes, title: str, metric: str, runs: Mapping[str, Records]) -> None:
    for index, (name, records) in enumerate(runs.items()):
        color, style = COLORS[index % len(COLORS)], STYLES[index // len(COLORS) % len(STYLES)]
        steps, values = series(records, metric)
        low, high = series(records, f"{metric}_low"), series(records, f"{metric}_high")
        if low[0] == high[0] == steps and steps:
            axes.fill_between(steps, low[1], high[1], color=color, alpha=0.12, linewidth=0)
        if len(steps) >= SMOOTH_FROM and not low[0]:  # an evaluation has its interval: it is not averaged over steps
            axes.plot(steps, values, color=color, alpha=0.2, linewidth=0.7)
            values = list(running_mean(values, max(5, len(steps) // 20)))
        marker = "o" if len(steps) < SMOOTH_FROM else ""
        axes.plot(steps, values, style, color=color, marker=marker, markersize=3, label=name)
    axes.set_title(title, fontsize=10, fontweight="bold", loc="left")
    axes.set_xlabel("Training step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, steps=[1, 2, 5, 10]))
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
