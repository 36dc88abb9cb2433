"""The comparison of bfloat16 with float32: its arithmetic on a clock that is set by hand, and that it runs at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_hdpo.model.dtype_speed import Bfloat16Speed, compare, layer_products, measure_bfloat16


class HandClock:
    """A clock that only products move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: dict[str, int] = {}

    def product(self, name: str, *seconds: float) -> Callable[[], None]:
        """A product that takes these seconds in its first calls, and the last of them from then on."""

        def run() -> None:
            call = self.calls[name] = self.calls.get(name, 0) + 1
            self.now += seconds[min(call, len(seconds)) - 1]

        return run

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


def test_the_least_time_of_each_product_counts(clock: HandClock) -> None:
    """The first call also compiles; noise only adds."""
    float32 = [clock.product("a", 0.05, 0.001), clock.product("b", 0.004, 0.002, 0.003)]
    bfloat16 = [clock.product("c", 0.06, 0.004, 0.009), clock.product("d", 0.002, 0.005)]
    speed = compare(float32, bfloat16, clock, limit=0.2)
    assert speed.slowdown == pytest.approx((0.004 + 0.002) / (0.001 + 0.002))
    assert speed.slow and not speed.at_least


def test_it_stops_after_the_limit(clock: HandClock) -> None:
    """Both passes are begun once at least; no product starts after the limit."""
    float32 = [clock.product(name, 0.01) for name in "abc"]
    bfloat16 = [clock.product(name, 0.03) for name in "def"]
    speed = compare(float32, bfloat16, clock, limit=0.2)
    assert speed == Bfloat16Speed(pytest.approx(3.0))
    assert sum(clock.calls[name] for name in "abc") == 20
    assert sum(clock.calls[name] for name in "def") == 7


def test_a_product_of_seconds_is_the_last_one(clock: HandClock) -> None:
    """Its time is a lower bound, and is called one."""
    float32 = [clock.product(name, 0.001) for name in "abc"]
    bfloat16 = [clock.product("d", 0.01), clock.product("e", 5.0), clock.product("f", 0.01)]
    speed = compare(float32, bfloat16, clock, limit=0.2)
    assert "f" not in clock.calls and clock.calls["e"] == 1
    assert speed == Bfloat16Speed(pytest.approx(5.01 / 0.003), at_least=True)
    assert str(speed) == "bfloat16 is at least 1670 times slower than float32 on this CPU"


def test_a_fast_product_is_not_repeated_for_ever(clock: HandClock) -> None:
    compare([clock.product("a", 1e-6)], [clock.product("b", 1e-6)], clock, limit=0.2)
    assert clock.calls == {"a": 20, "b": 20}


@pytest.mark.parametrize(
    ("slowdown", "slow", "says"),
    [
        (23.4, True, "23 times slower"),
        (1.01, True, "1.01 times slower"),
        (1.0, False, "1.00 times faster"),
        (0.4, False, "2.50 times faster"),
    ],
)
def test_no_slower_is_fast_enough(slowdown: float, slow: bool, says: str) -> None:
    speed = Bfloat16Speed(slowdown)
    assert speed.slow == slow and str(speed) == f"bfloat16 is {says} than float32 on this CPU"


def test_the_products_are_those_of_a_layer() -> None:
    shapes = [tuple(product().shape) for product in layer_products(8, 16, torch.bfloat16)]
    assert shapes == [(32, 16), (32, 8), (16, 8)]
    assert all(product().dtype is torch.bfloat16 for product in layer_products(8, 16, torch.bfloat16))


def test_wide_layers_are_cut() -> None:
    """One product cannot be stopped, so that it must not be large."""
    weights = layer_products(8192, 29568, torch.float32)[2]()
    assert weights.shape == (128, 8192)


def test_it_measures_here_and_keeps_the_threads() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert measure_bfloat16(32, 64).slowdown > 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
