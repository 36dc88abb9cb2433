"""Emulated FP8 products against references of their own: the grids from the bits of the formats, scales from the bits
of float32, gradients from float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_hdpo.model.fp8_emulation import (
    E4M3,
    E5M2,
    RECIPES,
    Operand,
    Recipe,
    current_scale,
    e8m0_scale,
    emulated_product,
    power_of_two_below,
    rounded,
    rounded_blocks,
    rounded_tensor,
)

LARGEST = {E4M3: 448.0, E5M2: 57344.0}
DTYPES = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
EVERY_RECIPE = pytest.mark.parametrize("name", RECIPES)
magnitudes = st.floats(2.0**-100, 2.0**100, width=32)


def grid(dtype: torch.dtype) -> np.ndarray:
    """The finite values >= 0 of the format, in the order of their codes, from sign, exponent and mantissa bits."""
    mantissa_bits, bias = {E4M3: (3, 7), E5M2: (2, 15)}[dtype]
    codes = np.arange(0x7F if dtype == E4M3 else 0x7C)  # behind them: NaN, and in e5m2 infinity
    mantissas, exponents = codes & (2**mantissa_bits - 1), codes >> mantissa_bits
    normal = exponents > 0
    fractions = mantissas / 2**mantissa_bits + normal
    return fractions * 2.0 ** (np.maximum(exponents, 1) - bias)


def nearest(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Round to the nearest value of the format; ties to the even code; at most the largest value."""
    of_format = grid(dtype)
    sizes = np.minimum(np.abs(values), of_format[-1])
    above = np.searchsorted(of_format, sizes).clip(1)
    low, high = of_format[above - 1], of_format[above]
    up = (high - sizes < sizes - low) | ((high - sizes == sizes - low) & (above % 2 == 0))
    return np.copysign(np.where(up, high, low), values)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@DTYPES
def test_the_largest_value(dtype: torch.dtype) -> None:
    assert grid(dtype)[-1] == LARGEST[dtype] == torch.finfo(dtype).max


@DTYPES
@given(st.lists(st.floats(-1e5, 1e5, width=32), min_size=1, max_size=20), st.integers(-20, 20))
def test_rounding_is_to_the_nearest_value_of_the_format(dtype: torch.dtype, values: list[float], power: int) -> None:
    """Scales that are powers of two, so that products with them are exact; values beyond the largest saturate."""
    x, scale = torch.tensor(values), torch.tensor(2.0**power)
    expected = nearest(x.numpy().astype(np.float64) * 2.0**power, dtype) / 2.0**power
    np.testing.assert_array_equal(rounded(x, scale, dtype).numpy(), expected.astype(np.float32))


@DTYPES
def test_every_value_and_every_tie(dtype: torch.dtype) -> None:
    values = grid(dtype)
    ties = (values[1:] + values[:-1]) / 2
    one = torch.tensor(1.0)
    np.testing.assert_array_equal(rounded(torch.tensor(values, dtype=torch.float32), one, dtype).numpy(), values)
    np.testing.assert_array_equal(
        rounded(torch.tensor(ties, dtype=torch.float32), one, dtype).numpy(), nearest(ties, dtype)
    )


@DTYPES
@given(magnitudes)
def test_the_current_scale_uses_the_whole_range(dtype: torch.dtype, amax: float) -> None:
    scale = float(current_scale(torch.tensor(amax), LARGEST[dtype]))
    assert scale == float(np.float32(LARGEST[dtype]) / np.float32(amax))


@DTYPES
@given(magnitudes)
def test_power_of_two_scales_are_the_largest_that_do_not_saturate(dtype: torch.dtype, amax: float) -> None:
    """Cut to a power of two: the bits of the mantissa are zero, sign and exponent as they were."""
    largest = LARGEST[dtype]
    exact = np.float32(largest) / np.float32(amax)
    expected = (exact.view(np.uint32) & np.uint32(0xFF800000)).view(np.float32)
    assert float(power_of_two_below(torch.tensor(amax), largest)) == expected
    assert expected * np.float64(amax) <= largest * (1 + 2**-23)


def _e8m0(value: np.float32) -> int:
    """The biased exponent of a value rounded up to a power of two, from the bits of float32."""
    bits = int(value.view(np.uint32))
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    return exponent + (mantissa > 0 and exponent != 0xFE)


@given(st.floats(2.0**-100, 2.0**120, width=32))
def test_e8m0_scales(amax: float) -> None:
    expected = 2.0 ** (127 - _e8m0(np.float32(amax) * np.float32(1 / 448)))
    assert float(e8m0_scale(torch.tensor(amax), 448.0)) == expected


@pytest.mark.parametrize("power", [-90, -1, 0, 1, 90])
def test_a_largest_value_that_fits_exactly(power: int) -> None:
    """At the boundary of two exponents each recipe takes the scale that uses the whole range."""
    amax = torch.tensor(448.0 * 2.0**power)
    for scale in (current_scale, power_of_two_below, e8m0_scale):
        assert float(scale(amax, 448.0)) == 2.0**-power, scale


@EVERY_RECIPE
@pytest.mark.parametrize("operand", ["activation", "weight", "gradient"])
def test_errors_are_within_half_a_step(name: str, operand: Operand) -> None:
    recipe = RECIPES[name]
    dtype = recipe.gradient if operand == "gradient" else E4M3
    mantissa_bits, smallest = (3, 2.0**-9) if dtype == E4M3 else (2, 2.0**-16)
    x = normal(150, 300) * torch.logspace(-6, 6, 300)  # from subnormal to saturated, if it had one scale
    found = recipe.round(x, operand)
    largest = x.abs().amax()
    # A power of two uses at least half of the range: the smallest step is relative to a scale at most twice too small.
    step = smallest * 2 * largest / torch.finfo(dtype).max
    allowed = torch.maximum(x.abs() * 2.0 ** -(mantissa_bits + 1), step / 2)
    assert bool(((found - x).abs() <= allowed * (1 + 1e-6)).all())


@EVERY_RECIPE
def test_what_is_on_the_grid_stays(name: str) -> None:
    """Rounding twice is rounding once where scales are powers of two, else up to the rounding of float32."""
    recipe = RECIPES[name]
    once = recipe.round(normal(64, 300), "activation")
    again = recipe.round(once, "activation")
    torch.testing.assert_close(again, once, rtol=0 if name != "tensorwise" else 1e-6, atol=0)


def test_types_of_the_recipes() -> None:
    """Hybrid: gradients alone are e5m2, which has two bits of mantissa; the block recipes are e4m3 throughout."""
    values = torch.tensor([[1.0, 1.125, 448.0]])  # 1.125 needs three bits; the scale is 1
    e5m2 = torch.tensor([[1.0, 1.125, 57344.0]])
    assert RECIPES["tensorwise"].round(values, "activation").tolist() == values.tolist()
    assert RECIPES["tensorwise"].round(e5m2, "gradient").tolist() == [[1.0, 1.0, 57344.0]]
    for name in ("blockwise", "mxfp8"):
        assert RECIPES[name].round(values, "gradient").tolist() == values.tolist()


BLOCKS: dict[tuple[str, Operand], tuple[int, int]] = {
    ("blockwise", "activation"): (1, 128),
    ("blockwise", "gradient"): (1, 128),
    ("blockwise", "weight"): (128, 128),
    ("mxfp8", "activation"): (1, 32),
    ("mxfp8", "gradient"): (1, 32),
    ("mxfp8", "weight"): (1, 32),
}


@pytest.mark.parametrize("name, operand", BLOCKS, ids=lambda value: value)
def test_an_outlier_changes_its_own_block_only(name: str, operand: Operand) -> None:
    rows, columns = BLOCKS[name, operand]
    x = normal(300, 300)
    spoiled = x.clone()
    spoiled[140, 270] = 1e6
    before, after = (RECIPES[name].round(value, operand) for value in (x, spoiled))
    changed = (before != after).nonzero()
    row, column = 140 // rows * rows, 270 // columns * columns
    assert len(changed) > columns // 4  # small neighbours are lost
    assert bool((changed[:, 0] >= row).all() and (changed[:, 0] < row + rows).all())
    assert bool((changed[:, 1] >= column).all() and (changed[:, 1] < column + columns).all())


def test_an_outlier_costs_a_tensor_with_one_scale_its_small_values() -> None:
    x = torch.full((4, 300), 1e-3)
    x[0, 0] = 1e3
    kept = RECIPES["tensorwise"].round(x, "activation")
    assert float(kept[0, 0]) == pytest.approx(1e3) and not kept[1:].any()
    assert RECIPES["blockwise"].round(x, "activation")[1:].all()


def test_blocks_against_a_loop() -> None:
    x = normal(130, 200) * 7
    found = rounded_blocks(x, E4M3, power_of_two_below, (128, 128))
    for row in (slice(0, 128), slice(128, 130)):
        for column in (slice(0, 128), slice(128, 200)):
            torch.testing.assert_close(
                found[row, column], rounded_tensor(x[row, column], E4M3, power_of_two_below), rtol=0, atol=0
            )


@EVERY_RECIPE
def test_zeros(name: str) -> None:
    """Also beside other values, and values so small that the ideal scale is not a float32."""
    recipe = RECIPES[name]
    assert not recipe.round(torch.zeros(3, 40), "activation").any()
    tiny = recipe.round(torch.tensor([[1e-42, 0.0]]), "activation")
    assert bool(tiny.isfinite().all()) and float(tiny.abs().max()) <= 2e-42
    assert recipe.round(torch.tensor([[3.0, 0.0, -0.0]]), "activation").tolist() == [[3.0, 0.0, 0.0]]


@EVERY_RECIPE
@pytest.mark.parametrize("shape", [(0, 40), (40, 0)])
def test_no_values(name: str, shape: tuple[int, int]) -> None:
    """An expert may get no token."""
    assert RECIPES[name].round(torch.zeros(shape), "activation").shape == shape
    x, weight = torch.zeros(0, 40, requires_grad=True), normal(24, 40).requires_grad_()
    output = emulated_product(x, weight, RECIPES[name])
    output.sum().backward()
    assert output.shape == (0, 24) and x.grad is not None and x.grad.shape == x.shape
    assert weight.grad is not None and not weight.grad.any()


@EVERY_RECIPE
def test_values_that_are_no_numbers(name: str) -> None:
    """NaN stays NaN. Infinity becomes the largest value of the type, as in Transformer Engine; with mxfp8, NaN."""
    recipe = RECIPES[name]
    assert bool(recipe.round(torch.tensor([[torch.nan, 1.0]]), "activation")[0, 0].isnan())
    infinite = recipe.round(torch.tensor([[torch.inf, -torch.inf, 1.0]]), "activation")
    if name == "mxfp8":
        assert bool(infinite.isnan().all())
    else:
        assert infinite.tolist() == [[448.0, -448.0, 1.0]]


@EVERY_RECIPE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_products_and_gradients_are_those_of_the_rounded_operands(name: str, dtype: torch.dtype) -> None:
    """Against float64. Every product rounds the original operands along its own sum."""
    recipe = RECIPES[name]
    x = normal(2, 75, 160).to(dtype).requires_grad_()
    weight = (normal(144, 160, seed=1) * 0.1).to(dtype).requires_grad_()
    upstream = (normal(2, 75, 144, seed=2) * 1e-3).to(dtype)
    output = emulated_product(x, weight, recipe)
    output.backward(upstream)
    flat, grad = x.detach().flatten(0, 1), upstream.flatten(0, 1)

    def product(a: torch.Tensor, of_a: Operand, b: torch.Tensor, of_b: Operand) -> torch.Tensor:
        return recipe.round(a, of_a).double() @ recipe.round(b, of_b).double().t()

    expected = {
        "output": (output, product(flat, "activation", weight.detach(), "weight")),
        "input": (x.grad, product(grad, "gradient", weight.detach().t(), "weight")),
        "weight": (weight.grad, product(grad.t(), "gradient", flat.t(), "activation")),
    }
    tolerance = 1e-6 if dtype is torch.float32 else 2.0**-8
    for what, (found, exact) in expected.items():
        assert found is not None and found.dtype is dtype
        error = (found.detach().flatten(0, -2).double() - exact).norm() / exact.norm()
        assert error < tolerance, what


@EVERY_RECIPE
def test_the_error_of_a_product_is_that_of_the_format(name: str) -> None:
    """Of the order of the formats' steps: neither nothing, nor more than rounding explains."""
    x, weight = normal(64, 512), normal(96, 512, seed=1)
    exact = x.double() @ weight.double().t()
    error = float((emulated_product(x, weight, RECIPES[name]).double() - exact).norm() / exact.norm())
    assert 0.02 < error < 0.05


def test_a_frozen_operand_has_no_gradient() -> None:
    x, weight = normal(5, 40).requires_grad_(), normal(24, 40)
    emulated_product(x, weight, RECIPES["blockwise"]).sum().backward()
    assert x.grad is not None and weight.grad is None
    trained = normal(24, 40).requires_grad_()
    emulated_product(normal(5, 40), trained, RECIPES["blockwise"]).sum().backward()
    assert trained.grad is not None


@pytest.mark.parametrize("scale", [current_scale, power_of_two_below, e8m0_scale])
def test_scales_are_positive_numbers(scale: Callable[[torch.Tensor, float], torch.Tensor]) -> None:
    """For every magnitude that float32 has, zero and subnormal ones included."""
    amax = torch.cat([torch.zeros(1), torch.logspace(-44, 38, 500), torch.tensor([torch.finfo(torch.float32).max])])
    found = scale(amax, 448.0)
    assert bool(found.isfinite().all()) and bool((found > 0).all())


def test_a_recipe_of_one_type() -> None:
    """Tensorwise without e5m2: gradients keep three bits of mantissa."""
    assert Recipe(current_scale).round(torch.tensor([[1.0, 1.125, 448.0]]), "gradient")[0, 1] == 1.125
