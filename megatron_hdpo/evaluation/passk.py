"""pass@k from repeated samples, and intervals over problems."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with the interval [low, high] at the requested confidence."""

    value: float
    low: float
    high: float
    problems: int


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the unbiased estimate of pass@k when c of n samples are right (Chen et al. 2021, equation 1).

    pass@k is the probability that at least one of k samples is right: 1 - C(n-c, k) / C(n, k), computed as the product
    1 - prod_{i=n-c+1}^{n} (1 - k/i), which neither overflows nor cancels.
    Raises ValueError unless 0 <= c <= n and 1 <= k <= n: fewer samples than k allow no unbiased estimate.
    """
    if not 0 <= c <= n:
        raise ValueError(f"c = {c} right samples of n = {n}: c must lie between 0 and n")
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples per problem, there are {n}")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def interval(values: Sequence[float], confidence: float = 0.95, seed: int = 0) -> Estimate:
    """Return the mean over problems with its interval: Wilson's for outcomes of 0 and 1, else a bootstrap.

    values: one per problem, in [0, 1]. Raises ValueError without problems.
    """
    if values and all(value in (0.0, 1.0) for value in values):
        return wilson(round(sum(values)), len(values), confidence)
    return bootstrap(values, confidence, seed=seed)


def bootstrap(
    values: Sequence[float],
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    statistic: Callable[[Sequence[float]], float] = fmean,
) -> Estimate:
    """Return the statistic of `values` with its percentile bootstrap interval (Efron 1979).

    The interval has no width where all values are equal; `wilson` is for yes-or-no outcomes. Raises ValueError without
    values.
    """
    if not values:
        raise ValueError("no problems to average over")
    _check_confidence(confidence)
    rng = random.Random(seed)
    means = sorted(statistic(rng.choices(values, k=len(values))) for _ in range(resamples))
    tail = (1.0 - confidence) / 2.0
    low, high = means[int(tail * resamples)], means[min(resamples - 1, int((1.0 - tail) * resamples))]
    return Estimate(statistic(values), low, high, len(values))


def wilson(right: int, total: int, confidence: float = 0.95) -> Estimate:
    """Return the share of `right` among `total` independent yes-or-no outcomes, with Wilson's score interval (1927).

    Raises ValueError unless 0 <= right <= total and total >= 1.
    """
    if total < 1 or not 0 <= right <= total:
        raise ValueError(f"{right} right of {total}: total must be positive and right between 0 and total")
    _check_confidence(confidence)
    z = NormalDist().inv_cdf(0.5 + confidence / 2.0)
    share, shrink = right / total, 1.0 + z * z / total
    centre = (share + z * z / (2 * total)) / shrink
    half = z / shrink * math.sqrt(share * (1.0 - share) / total + z * z / (4 * total * total))
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half), total)


def _check_confidence(confidence: float) -> None:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
