"""pass@k and mean@n from repeated samples, with intervals over problems."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with the interval [low, high] at the confidence that was asked for."""

    value: float
    low: float
    high: float
    problems: int


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased probability that one of k samples is right, when c of n samples were (Chen et al. 2021, equation 1).

    1 - C(n-c, k) / C(n, k), as the product 1 - prod_{i=n-c+1}^{n} (1 - k/i), which neither overflows nor cancels.
    Raises ValueError unless 0 <= c <= n and 1 <= k <= n: fewer samples than k allow no unbiased estimate.
    """
    if not 0 <= c <= n:
        raise ValueError(f"c = {c} right samples of n = {n}: c must lie between 0 and n")
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples per problem, there are {n}")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def mean_pass_at_k(counts: Sequence[tuple[int, int]], k: int, confidence: float = 0.95, seed: int = 0) -> Estimate:
    """pass@k over problems, given (n, c) of each, with a bootstrap interval. Raises ValueError without problems."""
    return bootstrap([pass_at_k(n, c, k) for n, c in counts], confidence, seed=seed)


def mean_at_n(rewards: Sequence[Sequence[float]], confidence: float = 0.95, seed: int = 0) -> Estimate:
    """Mean over problems of the mean over a problem's samples (mean@n), with a bootstrap interval over problems.

    Raises ValueError without problems, or for a problem without samples.
    """
    if not all(rewards):
        raise ValueError("mean@n: a problem has no samples")
    return bootstrap([fmean(of_problem) for of_problem in rewards], confidence, seed=seed)


def bootstrap(
    values: Sequence[float],
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    statistic: Callable[[Sequence[float]], float] = fmean,
) -> Estimate:
    """The statistic of `values` with its percentile bootstrap interval (Efron 1979).

    The interval has no width where all values are equal: see `wilson` for single yes-or-no outcomes.
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
    """Share of `right` among `total` independent yes-or-no outcomes, with Wilson's score interval (1927)."""
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
