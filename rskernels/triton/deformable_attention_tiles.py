"""What the kernels of deformable_attention share: a sample's place, its corners' values, tiles of rows."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from rskernels.triton.launch import config, dtype_class, power_of_2

MOST_CHANNELS = 256  # of a tile


def odd(sides: Sequence[int]) -> tuple[int, ...]:
    """2 s + 1 for every side s: of integers that are 1 or divisible by 16 the compiler makes builds of their
    own, and in a tuple it cannot be told not to. So all sizes of levels share one."""
    return tuple(2 * side + 1 for side in sides)


@triton.jit
def level_size(odd_sides, level: tl.constexpr):
    return odd_sides[2 * level] >> 1, odd_sides[2 * level + 1] >> 1


@triton.jit
def sample_place(locations, weights, sample, mask, height, width):
    """Where samples lie: column and row of their upper left pixel, the fractions beyond it, their weight, and
    what spoils their results: NaN for a location that is no finite number, else 0."""
    x = tl.load(locations + 2 * sample, mask=mask, other=0.0).to(tl.float32) * width - 0.5
    y = tl.load(locations + 2 * sample + 1, mask=mask, other=0.0).to(tl.float32) * height - 0.5
    weight = tl.load(weights + sample, mask=mask, other=0.0).to(tl.float32)
    finite = (tl.abs(x) < float("inf")) & (tl.abs(y) < float("inf"))
    # Two pixels outside is as good as any further, and fits an integer.
    x = tl.minimum(tl.maximum(tl.where(finite, x, -2.0), -2.0), width + 1.0)
    y = tl.minimum(tl.maximum(tl.where(finite, y, -2.0), -2.0), height + 1.0)
    left, top = tl.floor(x), tl.floor(y)
    spoiled = tl.where(finite, 0.0, float("nan"))
    return left.to(tl.int32), top.to(tl.int32), x - left, y - top, weight, spoiled


@triton.jit
def corner(level, x, y, mask, channels, channels_in, height, width, pixel_stride):
    """The values of pixels (x, y), zero outside: (rows, channels). level: where each row's level begins."""
    inside = mask & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    at = level + (y * width + x).to(tl.int64) * pixel_stride
    pixels = tl.load(at[:, None] + channels[None, :], mask=inside[:, None] & channels_in[None, :], other=0.0)
    return pixels.to(tl.float32)


def tile(kernel: str, value: Tensor) -> dict[str, int]:
    """The kernel's constants for values of this dtype and head dim."""
    channels = min(power_of_2(value.shape[3]), MOST_CHANNELS)
    constants = config(
        f"deformable_attention.{kernel}", f"{dtype_class(value.dtype)}/d{channels}", value.device
    )
    return {"BLOCK_D": channels} | constants
