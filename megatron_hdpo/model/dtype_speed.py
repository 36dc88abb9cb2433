"""Measurement of bfloat16 against float32 on this CPU, on matrix products of one layer.

The processor's flags are not enough: libraries have kernels for some products and not for others. Without bfloat16
instructions a product is about 10 to 60 times slower than in float32; with them it is 2 to 5 times faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

LIMIT_S = 0.2
"""Seconds after which the measurement of one precision starts no further product."""

_ROWS = 32
_MOST_WEIGHTS = 2**20  # bounds a single product, which cannot be stopped: 0.1 s where bfloat16 is slowest
_PASSES = 20

Product = Callable[[], object]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Bfloat16Speed:
    """Time of bfloat16 products over time of the same float32 products on this CPU.

    slowdown: above 1 if bfloat16 is slower. at_least: true if bfloat16 was stopped at the time limit, so that the
    true slowdown is larger.
    """

    slowdown: float
    at_least: bool = False

    @property
    def slow(self) -> bool:
        """Return whether bfloat16 is slower than float32."""
        return self.slowdown > 1.0

    def __str__(self) -> str:
        """Return `bfloat16 is 23 times slower than float32 on this CPU`, or how many times faster it is."""
        factor = self.slowdown if self.slow else 1.0 / self.slowdown
        amount = f"{'at least ' if self.at_least else ''}{factor:.{0 if factor >= 10 else 2}f} times"
        return f"bfloat16 is {amount} {'slower' if self.slow else 'faster'} than float32 on this CPU"


Measure = Callable[[int, int], Bfloat16Speed]
"""A function of a layer's hidden size and FFN channels."""


def measure_bfloat16(hidden: int, channels: int) -> Bfloat16Speed:
    """Compare one layer's product in both precisions, forward and backward; takes at most half a second.

    hidden, channels: input and output size of the product; above 2**20 weights fewer channels are measured.

    The products run on one thread and its CPU time is compared, which does not depend on how busy the machine is. The
    wall-clock time of products of microseconds would mostly measure the scheduler and threads that wait for each other.
    """
    with _one_thread():
        return compare(
            layer_products(hidden, channels, torch.float32), layer_products(hidden, channels, torch.bfloat16)
        )


def layer_products(hidden: int, channels: int, dtype: torch.dtype) -> list[Product]:
    """Return the forward product of a linear layer and the two of its backward pass, for a few rows."""
    channels = max(1, min(channels, _MOST_WEIGHTS // hidden))
    inputs = torch.ones(_ROWS, hidden, dtype=dtype)
    weight = torch.ones(channels, hidden, dtype=dtype)
    gradient = torch.ones(_ROWS, channels, dtype=dtype)
    return [
        lambda: torch.mm(inputs, weight.t()),
        lambda: torch.mm(gradient, weight),
        lambda: torch.mm(gradient.t(), inputs),
    ]


def compare(
    float32: Sequence[Product], bfloat16: Sequence[Product], clock: Clock = time.thread_time, limit: float = LIMIT_S
) -> Bfloat16Speed:
    """Compare the same products in two precisions.

    limit: seconds of `clock` after which no further product starts. If bfloat16 reaches the limit within its first
    pass, its time so far counts and the result has `at_least` set.
    """
    # The first pass of float32 is not cut: without it there is nothing to compare with.
    base = sum(_least_seconds(float32, clock, limit, cut_first_pass=False))
    seconds = _least_seconds(bfloat16, clock, limit, cut_first_pass=True)
    return Bfloat16Speed(sum(seconds) / base, at_least=len(seconds) < len(bfloat16))


def _least_seconds(products: Sequence[Product], clock: Clock, limit: float, cut_first_pass: bool) -> list[float]:
    """Return the shortest time of each product over several passes; fewer numbers if the first pass was cut.

    The shortest, because the first call of a product also compiles its kernel.
    """
    least: list[float] = []
    start = clock()
    for number in range(_PASSES):
        for index, product in enumerate(products):
            before = clock()
            if before - start >= limit and (number > 0 or cut_first_pass):
                return least
            product()
            seconds = clock() - before
            if number == 0:
                least.append(seconds)
            else:
                least[index] = min(least[index], seconds)
    return least


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
