"""FP8 matrix products emulated on any device: operands rounded to FP8 values, products in float32.

The scales are those of Transformer Engine's recipes (2.11), so that the rounding of a GPU is seen without one:

- tensorwise: current scaling, hybrid. One scale for a tensor; e4m3, output gradients in e5m2.
- blockwise: e4m3. Scales of 1 x 128 values along the products' sum for activations and gradients, of 128 x 128 for
  weights; powers of two.
- mxfp8: e4m3. Scales of 1 x 32 values along the sum; powers of two (e8m0).

Not emulated: the accumulator of Hopper's tensor cores, which keeps fewer bits than float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

RecipeName = Literal["tensorwise", "blockwise", "mxfp8"]
Operand = Literal["activation", "weight", "gradient"]
Scale = Callable[[Tensor, float], Tensor]
"""Map the largest magnitude of a block, and the largest value of the FP8 type, to the factor before rounding."""

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_LARGEST_SCALE = torch.finfo(torch.float32).max


def current_scale(amax: Tensor, largest: float) -> Tensor:
    """Return the scale that maps `amax` to the largest value of the type.

    As in Transformer Engine, it is 1 where `amax` is infinite (infinite values become the largest one), and at most the
    largest float32, also for a block of zeros. NaN stays NaN.
    """
    # A number divided by a tensor would be the product with the reciprocal, which can be below a power of two.
    scale = (torch.full_like(amax, largest) / amax).clamp(max=_LARGEST_SCALE)
    return torch.where(amax.isinf(), 1.0, scale)


def power_of_two_below(amax: Tensor, largest: float) -> Tensor:
    """Return the current scale, cut to a power of two: no value of the block saturates."""
    scale = current_scale(amax, largest)
    mantissa, exponent = torch.frexp(scale)
    power = torch.ldexp(torch.ones_like(scale), exponent - 1)
    return torch.where(mantissa.isnan(), mantissa, power)


def e8m0_scale(amax: Tensor, largest: float) -> Tensor:
    """Return the inverse of amax / largest, rounded up to a power of two that e8m0 can hold.

    1 for a block of zeros. A block with an infinite or undefined value becomes NaN.
    """
    mantissa, exponent = torch.frexp(amax * (1.0 / largest))
    up = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(min=-127)
    scale = torch.ldexp(torch.ones_like(amax), -up)
    scale = torch.where(amax == 0, 1.0, scale)
    return torch.where(amax.isfinite(), scale, torch.nan)


def rounded(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round x * scale to values of the FP8 type, at most its largest one, and divide by the scale. Float32."""
    largest = torch.finfo(dtype).max
    return (x * scale).clamp(-largest, largest).to(dtype).float() * scale.reciprocal()


def rounded_tensor(x: Tensor, dtype: torch.dtype, scale: Scale) -> Tensor:
    """Round a tensor of any shape with one scale."""
    if not x.numel():
        return x
    return rounded(x, scale(x.abs().amax(), torch.finfo(dtype).max), dtype)


def rounded_blocks(x: Tensor, dtype: torch.dtype, scale: Scale, block: tuple[int, int]) -> Tensor:
    """Round a matrix with one scale for each block of rows x columns; the last blocks may be smaller."""
    if not x.numel():
        return x
    rows, columns = x.shape
    high, wide = (min(size, length) for size, length in zip(block, x.shape, strict=True))
    padded = F.pad(x, (0, -columns % wide, 0, -rows % high))
    blocks = padded.reshape(padded.shape[0] // high, high, padded.shape[1] // wide, wide)
    scales = scale(blocks.abs().amax(dim=(1, 3), keepdim=True), torch.finfo(dtype).max)
    return rounded(blocks, scales, dtype).reshape(padded.shape)[:rows, :columns]


@dataclass(frozen=True)
class Recipe:
    """Rounding of the operands of a product.

    gradient: type of output gradients; all else is e4m3. block, weight_block: rows x columns with one scale, the
    product's sum running over the columns; None: the whole tensor.
    """

    scale: Scale
    gradient: torch.dtype = E4M3
    block: tuple[int, int] | None = None
    weight_block: tuple[int, int] | None = None

    def round(self, x: Tensor, operand: Operand) -> Tensor:
        """Round an operand; the product's sum runs over its columns. Float32."""
        dtype = self.gradient if operand == "gradient" else E4M3
        block = self.weight_block if operand == "weight" else self.block
        if block is None:
            return rounded_tensor(x.float(), dtype, self.scale)
        return rounded_blocks(x.float(), dtype, self.scale, block)


RECIPES: dict[RecipeName, Recipe] = {
    "tensorwise": Recipe(current_scale, gradient=E5M2),
    "blockwise": Recipe(power_of_two_below, block=(1, 128), weight_block=(128, 128)),
    "mxfp8": Recipe(e8m0_scale, block=(1, 32), weight_block=(1, 32)),
}


class EmulatedProduct(torch.autograd.Function):
    """x W^T, and the two products of its gradient, with operands rounded by a recipe.

    Each product rounds the original operands along its own sum, as Transformer Engine does.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
        """Multiply x [rows, inputs] by weight [outputs, inputs] to [rows, outputs], in the type of x."""
        ctx.save_for_backward(x, weight)
        ctx.recipe = recipe
        return (recipe.round(x, "activation") @ recipe.round(weight, "weight").t()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Return the gradients of x and weight, each in the type of its tensor."""
        x, weight = ctx.saved_tensors
        of_x, of_weight, recipe = None, None, ctx.recipe
        if ctx.needs_input_grad[0]:
            product = recipe.round(grad, "gradient") @ recipe.round(weight.t(), "weight").t()
            of_x = product.to(x.dtype)
        if ctx.needs_input_grad[1]:
            product = recipe.round(grad.t(), "gradient") @ recipe.round(x.t(), "activation").t()
            of_weight = product.to(weight.dtype)
        return of_x, of_weight, None


def emulated_product(x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
    """Multiply x [..., inputs] by weight [outputs, inputs] with operands rounded by the recipe, differentiably."""
    product: Tensor = EmulatedProduct.apply(x.flatten(0, -2), weight, recipe)
    return product.unflatten(0, x.shape[:-1])
