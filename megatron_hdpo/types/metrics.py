"""Metrics that carry how their values, of several updates or ranks, become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

Reduction = Literal["mean", "sum", "max", "min"]


class Metric(float):
    """A number of which updates or ranks give the sum, the largest, the smallest or the mean by weight.

    A plain float is averaged with weight 1.
    """

    reduction: Reduction
    weight: float

    def __new__(cls, value: float, reduction: Reduction, weight: float = 1.0) -> Metric:
        """Return the number with its reduction; weight: in a mean, such as the number of tokens that it is over."""
        metric = super().__new__(cls, value)
        metric.reduction, metric.weight = reduction, weight
        return metric

    def __getnewargs__(self) -> tuple[float, Reduction, float]:  # type: ignore[override]  # float's own takes one
        return float(self), self.reduction, self.weight


def mean_over(total: float, count: float) -> Metric:
    """Return total / count, which updates of a step join to the mean over all that they counted."""
    return Metric(total / count, "mean", count)


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
            weights = [getattr(value, "weight", 1.0) for value in values]
            if len(set(weights)) == 1:
                return sum(values) / len(values)
            return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
