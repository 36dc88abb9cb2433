"""Metrics that carry how their values, of several updates or ranks, become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

Reduction = Literal["mean", "sum", "max", "min"]


class Metric(float):
    """A number of which updates or ranks give the sum, the largest or the smallest. A plain float is averaged."""

    reduction: Reduction

    def __new__(cls, value: float, reduction: Reduction) -> Metric:
        """Return the number with its reduction."""
        metric = super().__new__(cls, value)
        metric.reduction = reduction
        return metric

    def __getnewargs__(self) -> tuple[float, Reduction]:  # type: ignore[override]  # float's own takes one argument
        return float(self), self.reduction


def reduce_metrics(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return one value per name, from the parts that have it: sum, maximum, minimum or mean, as its first says.

    Names are in the order in which they first appear.
    """
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: _reduced([part[name] for part in parts if name in part]) for name in names}


def _reduced(values: Sequence[float]) -> float:
    match getattr(values[0], "reduction", "mean"):
        case "max":
            return max(map(float, values))
        case "min":
            return min(map(float, values))
        case "sum":
            return float(sum(map(float, values)))
        case _:
            return sum(values) / len(values)
