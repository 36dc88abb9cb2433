"""Shared parts of the figure's panels: tick labels, running means, bars over ranges of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib.ticker import Formatter

MOST_BARS = 50
"""More steps than this are drawn as bars of several steps each."""


class PlainTicks(Formatter):
    """Short tick labels with the same number of decimals: 0.80, 1.00; 30k; 2e-8.

    Each label has the whole number: matplotlib's factor or offset above the axis would overlap the legend there.
    """

    def __call__(self, value: float, pos: int | None = None) -> str:
        return self.format_ticks([value])[0]

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        largest = max((abs(value) for value in values), default=0.0)
        if 0 < largest < 1e-3 or largest >= 1e9:
            return [f"{value:.3g}".replace("e-0", "e-").replace("e+", "e") for value in values]
        divisor, unit = (1e6, "M") if largest >= 1e7 else (1e3, "k") if largest >= 1e4 else (1.0, "")
        scaled = [value / divisor for value in values]
        exact = (n for n in range(6) if all(abs(round(value, n) - value) < 1e-9 * (1 + abs(value)) for value in scaled))
        decimals = next(exact, 6)
        return [f"{value:.{decimals}f}{unit}" if value else "0" for value in scaled]


def running_mean(values: Sequence[float], window: int) -> np.ndarray:
    """Return the means of the last `window` values (of fewer at the start): float64 [len(values)]."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def binned(steps: Sequence[int], rows: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray, float]:
    """Return means over equal ranges of steps, few enough for bars: centres [B], means [rows, B], width in steps."""
    size = math.ceil((steps[-1] - steps[0] + 1) / MOST_BARS)
    if size == 1:
        width = min((after - before for before, after in pairwise(steps)), default=1)
        return np.array(steps, dtype=float), np.array(rows, dtype=float), width
    index = (np.array(steps) - steps[0]) // size
    present = np.unique(index)
    means = np.array([[np.mean(np.asarray(row)[index == each]) for each in present] for row in rows])
    return steps[0] + (present + 0.5) * size - 0.5, means, size
