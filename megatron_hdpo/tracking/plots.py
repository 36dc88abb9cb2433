"""The figure report.png: six panels that summarise a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from megatron_hdpo.tracking.names import STEP_SECONDS
from megatron_hdpo.tracking.plot_parts import MOST_BARS, PlainTicks, binned, running_mean
from megatron_hdpo.tracking.summary import Records, evaluations, phases, series

# Okabe and Ito's palette (2008), told apart also by colour-blind readers.
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#8C8C8C"
COLORS = (BLUE, ORANGE, GREEN, RED, PURPLE)
STYLES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")
SMOOTH_FROM = 40
"""Number of steps from which a running mean is drawn over the single steps."""
Handles = list[Line2D | Patch]


def draw_report(records: Records) -> bytes:
    """Return the PNG of a run. records: its steps, at least one; a panel without data says so."""
    figure = Figure(figsize=(13.5, 7.4), dpi=150)
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.06, right=0.94, top=0.9, bottom=0.1, wspace=0.44, hspace=0.58)
    panels: Sequence[tuple[str, Callable[[Axes, Records], Handles]]] = (
        ("Reward and cliffs", _reward),
        ("Held-out pass@k", _pass_at_k),
        ("Privileged rollouts, distilled tokens", _privileged),
        ("Divergence and coverage", _divergence),
        ("Gradient norm and entropy", _optimisation),
        ("Time per step", _time),
    )
    for axes, letter, (title, draw) in zip(figure.subplots(2, 3).flat, "abcdef", panels, strict=True):
        handles = draw(axes, records)
        _finish(axes, f"({letter}) {title}", handles, records)
    figure.text(0.06, 0.015, _note(records), fontsize=8.5, color="#555555")
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _reward(axes: Axes, records: Records) -> Handles:
    handles = _curve(axes, records, "rollout/reward_mean", BLUE, "mean reward")
    handles += _curve(axes, records, "rollout/cliff_rate", RED, "cliff rate")
    axes.set_ylabel("Reward; share of prompts")
    _unit_range(axes)
    return handles


def _pass_at_k(axes: Axes, records: Records) -> Handles:
    found = evaluations(records)
    sets = sorted({dataset for _, dataset, _ in found})
    ks = sorted({k for _, _, k in found})
    color = {k: COLORS[index % len(COLORS)] for index, k in enumerate(ks)}
    style = {dataset: STYLES[index % len(STYLES)] for index, dataset in enumerate(sets)}
    for name, dataset, k in found:
        axes.plot(*series(records, name), style[dataset], color=color[k], marker="o", markersize=3.5)
    axes.set_ylabel("Share of problems solved")
    axes.margins(y=0.1)
    handles: Handles = [Line2D([], [], color=color[k], marker="o", markersize=3.5, label=f"pass@{k}") for k in ks]
    if len(sets) > 1:
        handles += [Line2D([], [], color="black", linestyle=style[each], label=each or "held-out") for each in sets]
    return handles


def _privileged(axes: Axes, records: Records) -> Handles:
    handles = _curve(axes, records, "privileged/success_rate", GREEN, "privileged success")
    _color_axis(axes, "Share of privileged rollouts right", GREEN)
    _unit_range(axes)
    steps, tokens = series(records, "distill/tokens")
    if steps:
        right = _right_axis(axes, "Tokens distilled per step", "#666666")
        centres, (means,), width = binned(steps, [tokens])
        right.bar(centres, means, width=0.8 * width, color=GREY, alpha=0.45, linewidth=0)
        right.set_ylim(bottom=0)
        right.yaxis.set_major_locator(MaxNLocator(5))
        right.yaxis.set_major_formatter(PlainTicks())
        handles.append(Patch(color=GREY, alpha=0.45, linewidth=0, label="tokens distilled"))
    return handles


def _divergence(axes: Axes, records: Records) -> Handles:
    handles = _curve(axes, records, "distill/divergence", PURPLE, "divergence")
    _color_axis(axes, "Divergence (nats per token)", PURPLE)
    if handles and min(series(records, "distill/divergence")[1]) >= 0:  # with clipped summands it may be negative
        axes.set_ylim(bottom=0)
    if series(records, "distill/covered_mass")[0]:
        right = _right_axis(axes, "Student mass on teacher's top-k", BLUE)
        handles += _curve(right, records, "distill/covered_mass", BLUE, "covered mass")
    return handles


def _optimisation(axes: Axes, records: Records) -> Handles:
    handles = _curve(axes, records, "train/grad_norm", RED, "gradient norm")
    positive = [norm for norm in series(records, "train/grad_norm")[1] if norm > 0]
    if positive and max(positive) > 30 * min(positive):
        axes.set_yscale("log")
    _color_axis(axes, "Gradient norm", RED)
    if series(records, "train/entropy")[0]:
        right = _right_axis(axes, "Entropy (nats per token)", GREEN)
        handles += _curve(right, records, "train/entropy", GREEN, "policy entropy")
    return handles


def _time(axes: Axes, records: Records) -> Handles:
    timed = [record for record in records if any(name in record for name, _ in phases(records))]
    layers = _time_layers(timed)
    if not layers:
        return []
    centres, values, width = binned([record["step"] for record in timed], [layer for _, layer in layers])
    bottom = np.zeros(len(centres))
    handles: Handles = []
    for index, ((label, _), layer) in enumerate(zip(layers, values, strict=True)):
        color = GREY if label == "other" else COLORS[index]
        axes.bar(centres, layer, bottom=bottom, width=0.85 * width, color=color, linewidth=0)
        bottom += layer
        handles.append(Patch(color=color, linewidth=0, label=label.replace("_", " ")))
    axes.set_ylabel("Wall time (s)")
    return handles


def _time_layers(records: Records) -> list[tuple[str, list[float]]]:
    """Return the longest phases, and `other`: shorter phases and time that no phase measured."""
    shown = phases(records)[: len(COLORS)]
    layers = [(phase, [record.get(name) or 0.0 for record in records]) for name, phase in shown]
    every = [math.fsum(record.get(name) or 0.0 for name, _ in phases(records)) for record in records]
    whole = [max(record.get(STEP_SECONDS) or 0.0, every[index]) for index, record in enumerate(records)]
    other = [whole[index] - math.fsum(layer[index] for _, layer in layers) for index in range(len(records))]
    return [*layers, ("other", other)] if max(other, default=0.0) > 1e-6 else layers


def _curve(axes: Axes, records: Records, name: str, color: str, label: str) -> Handles:
    steps, values = series(records, name)
    if not steps:
        return []
    window = _window(records)
    if not window:
        (line,) = axes.plot(steps, values, color=color, marker="o", markersize=3, label=label)
    else:
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        (line,) = axes.plot(steps, running_mean(values, window), color=color, linewidth=1.8, label=label)
    _plain_numbers(axes)
    return [line]


def _plain_numbers(axes: Axes) -> None:
    low, high = axes.get_ylim()
    if high - low < 1e-6 * max(abs(low), abs(high)):  # a constant, apart from rounding
        low, high = low - 0.05 * abs(low), high + 0.05 * abs(high)
        axes.set_ylim(low, high)
    axes.yaxis.set_major_formatter(PlainTicks())


def _window(records: Records) -> int:
    return max(5, len(records) // 20) if len(records) >= SMOOTH_FROM else 0


def _note(records: Records) -> str:
    parts = []
    if window := _window(records):
        parts.append(f"Thin lines: single steps; thick lines: mean of the last {window} points.")
    if (span := records[-1]["step"] - records[0]["step"] + 1) > MOST_BARS:
        parts.append(f"Bars: means over {math.ceil(span / MOST_BARS)} steps.")
    return " ".join(parts)


def _finish(axes: Axes, title: str, handles: Handles, records: Records) -> None:
    # The title is the legend's: so the two cannot overlap, nor hide a curve, however many entries there are.
    axes.legend(
        handles=handles,
        title=title,
        title_fontproperties={"weight": "bold", "size": 11},
        alignment="left",
        loc="lower left",
        bbox_to_anchor=(-0.03, 1.0),
        ncols=3,
        frameon=False,
        fontsize=9,
        borderaxespad=0.1,
        columnspacing=1.2,
        handlelength=1.5,
        labelspacing=0.3,
    )
    axes.spines[["top", "right"]].set_visible(False)
    if not handles:
        axes.text(0.5, 0.5, "not recorded in this run", transform=axes.transAxes, ha="center", color=GREY)
        axes.set(xticks=[], yticks=[], ylabel="")
        return
    first, last = records[0]["step"], records[-1]["step"]
    axes.set_xlabel("Training step")
    axes.set_xlim(first - 0.5 - 0.01 * (last - first), last + 0.5 + 0.01 * (last - first))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def _color_axis(axes: Axes, label: str, color: str) -> None:
    axes.set_ylabel(label, color=color)
    axes.tick_params(axis="y", labelcolor=color)


def _right_axis(axes: Axes, label: str, color: str) -> Axes:
    right = axes.twinx()
    _color_axis(right, label, color)
    right.spines["top"].set_visible(False)
    # Curves of the left axis stay in front of what is drawn on the right one.
    axes.set_zorder(right.get_zorder() + 1)
    axes.patch.set_visible(False)
    return right


def _unit_range(axes: Axes) -> None:
    """Limit the axis to 0 to 1 where the data are shares; larger rewards extend it."""
    low, high = axes.get_ylim()
    if low >= -0.2 and high <= 1.2:
        axes.set_ylim(-0.03, 1.03)
