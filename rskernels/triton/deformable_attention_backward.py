"""deformable_attention's backward pass on the GPU, without atomics. Shapes: deformable_attention.py.

Locations and weights: as forward, a tile of rows at a time; four products grad · corner of a sample make all
three numbers. Value: samples are sorted by the pixel at their upper left, so that a pixel finds the samples
that touch it in two runs of the list, and adds them up in the list's order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rskernels.triton.deformable_attention_tiles import (
    MOST_CHANNELS,
    corner,
    level_size,
    odd,
    sample_place,
    tile,
)
from rskernels.triton.launch import (
    cdiv,
    config,
    dtype_class,
    is_noting,
    launch,
    power_of_2,
    with_channels_together,
)

KEYS_BLOCK = 256


@triton.jit
def grad_tile(grad, row, row_in, channels, channels_in, dim):
    at = grad + row[:, None] * dim + channels[None, :]
    return tl.load(at, mask=row_in[:, None] & channels_in[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def samples_kernel(
    grad, value, locations, weights, grad_locations, grad_weights, odd_sides,
    rows, heads, dim, points, batch_stride, pixel_stride, head_stride,
    LEVELS: tl.constexpr, LOCATIONS: tl.constexpr, WEIGHTS: tl.constexpr, ONE_TILE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile's locations and weights. rows: Q·h, of one image."""
    blocks = tl.cdiv(rows, BLOCK_R)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_in = row < rows
    level_at = value + batch * batch_stride + (row % heads).to(tl.int64) * head_stride
    row = batch * rows + row
    sample = row * (LEVELS * points)
    if ONE_TILE:
        g = grad_tile(grad, row, row_in, tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_D) < dim, dim)
    for level in tl.static_range(LEVELS):
        height, width = level_size(odd_sides, level)
        for point in range(points):
            x, y, right, down, weight, spoiled = sample_place(
                locations, weights, sample + point, row_in, height, width
            )
            upper_left = tl.zeros((BLOCK_R,), tl.float32)
            upper_right = tl.zeros((BLOCK_R,), tl.float32)
            lower_left = tl.zeros((BLOCK_R,), tl.float32)
            lower_right = tl.zeros((BLOCK_R,), tl.float32)
            for first in range(0, 1 if ONE_TILE else dim, BLOCK_D):
                channels = first + tl.arange(0, BLOCK_D)
                channels_in = channels < dim
                if not ONE_TILE:
                    g = grad_tile(grad, row, row_in, channels, channels_in, dim)
                pixels = corner(level_at, x, y, row_in, channels, channels_in, height, width, pixel_stride)
                upper_left += tl.sum(g * pixels, 1)
                pixels = corner(
                    level_at, x + 1, y, row_in, channels, channels_in, height, width, pixel_stride
                )
                upper_right += tl.sum(g * pixels, 1)
                pixels = corner(
                    level_at, x, y + 1, row_in, channels, channels_in, height, width, pixel_stride
                )
                lower_left += tl.sum(g * pixels, 1)
                pixels = corner(
                    level_at, x + 1, y + 1, row_in, channels, channels_in, height, width, pixel_stride
                )
                lower_right += tl.sum(g * pixels, 1)
            if WEIGHTS:
                upper = upper_left * (1 - right) + upper_right * right
                lower = lower_left * (1 - right) + lower_right * right
                result = upper * (1 - down) + lower * down + spoiled
                tl.store(grad_weights + sample + point, result.to(grad_weights.dtype.element_ty), mask=row_in)
            if LOCATIONS:
                weight += spoiled
                along_x = (upper_right - upper_left) * (1 - down) + (lower_right - lower_left) * down
                along_y = (lower_left - upper_left) * (1 - right) + (lower_right - upper_right) * right
                to = grad_locations + 2 * (sample + point)
                tl.store(to, (along_x * weight * width).to(grad_locations.dtype.element_ty), mask=row_in)
                tl.store(to + 1, (along_y * weight * height).to(grad_locations.dtype.element_ty), mask=row_in)
        sample += points
        level_at += tl.full((), 1, tl.int64) * height * width * pixel_stride


@triton.jit(do_not_specialize=["samples", "rows", "cells", "nowhere"])
def keys_kernel(
    locations, weights, keys, odd_sides, samples, rows, heads, points, cells, nowhere,
    LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The cell of every sample: that of its upper left pixel, which may lie a row above or a column left
    of the level, in a grid of (height + 1, width + 1) per image, head and level; `nowhere` if it has none.
    """
    sample = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = sample < samples
    of_level = (sample // points) % LEVELS
    row = sample // (points * LEVELS)
    plane = (row // rows) * heads + row % heads
    height = tl.zeros((BLOCK,), tl.int32)
    width = tl.zeros((BLOCK,), tl.int32)
    first = tl.zeros((BLOCK,), tl.int32)
    passed = 0
    for level in tl.static_range(LEVELS):
        level_height, level_width = level_size(odd_sides, level)
        height = tl.where(of_level == level, level_height, height)
        width = tl.where(of_level == level, level_width, width)
        first = tl.where(of_level == level, passed, first)
        passed += (level_height + 1) * (level_width + 1)
    x, y, _, _, _, spoiled = sample_place(locations, weights, sample, mask, height, width)
    touches = (x >= -1) & (x < width) & (y >= -1) & (y < height) & (spoiled == 0)
    key = plane * cells + first + (y + 1) * (width + 1) + x + 1
    tl.store(keys + sample, tl.where(touches, key, nowhere).to(keys.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["height", "width", "first_pixel", "first_cell", "pixels", "cells"])
def gather_kernel(
    grad, locations, weights, order, starts, grad_value, height, width, first_pixel, first_cell,
    pixels, cells, heads, dim, samples_of_row,
    WIDE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of one pixel and head of a level: the samples of four cells, neighbours in pairs."""
    head = tl.program_id(0) % heads
    pixel = (tl.program_id(0) // heads) % (height * width)
    batch = (tl.program_id(0) // heads // (height * width)).to(tl.int64)
    row, column = pixel // width, pixel % width
    cell = (batch * heads + head) * cells + first_cell + row * (width + 1) + column
    above, above_end = tl.load(starts + cell), tl.load(starts + cell + 2)
    below, below_end = tl.load(starts + cell + width + 1), tl.load(starts + cell + width + 3)
    channels = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    channels_in = channels < dim
    lanes = tl.arange(0, BLOCK_K)
    split = above_end - above
    count = split + below_end - below
    total = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for start in range(0, count, BLOCK_K):
        k = start + lanes
        mask = k < count
        at = tl.where(k < split, above + k, below + k - split)
        sample = tl.load(order + at, mask=mask, other=0)
        if not WIDE:
            sample = sample.to(tl.int32)
        of_row = (sample // samples_of_row).to(tl.int64)
        x, y, right, down, weight, _ = sample_place(locations, weights, sample, mask, height, width)
        # A sample that rounding put elsewhere than keys_kernel did has no part, rather than a wrong one.
        along = tl.where(x == column, 1 - right, tl.where(x + 1 == column, right, 0.0))
        share = weight * along * tl.where(y == row, 1 - down, tl.where(y + 1 == row, down, 0.0))
        total += share[:, None] * grad_tile(grad, of_row, mask, channels, channels_in, dim)
    to = grad_value + ((batch * pixels + first_pixel + pixel) * heads + head) * dim + channels
    tl.store(to, tl.sum(total, 0).to(grad_value.dtype.element_ty), mask=channels_in)


def noted_keys(locations: Tensor, sizes: list[tuple[int, int]], cells: int) -> Tensor:
    """What keys_kernel writes: the tuner replays the launches after it with the runs that samples make."""
    batch, _, heads, *_ = locations.shape
    sides = torch.tensor([(width, height) for height, width in sizes])
    x, y = (locations.float() * sides[:, None] - 0.5).floor().long().unbind(-1)
    width, height = (side[:, None] for side in sides.unbind(-1))
    first = ((width + 1) * (height + 1)).cumsum(0) - (width + 1) * (height + 1)
    plane = torch.arange(batch)[:, None] * heads + torch.arange(heads)
    key = plane[:, None, :, None, None] * cells + first + (y + 1) * (width + 1) + x + 1
    inside = (x >= -1) & (x < width) & (y >= -1) & (y < height)
    return torch.where(inside, key, batch * heads * cells).flatten()


def sample_gradients(
    grad: Tensor, value: Tensor, sides: tuple[int, ...], locations: Tensor, weights: Tensor,
    wants_locations: bool, wants_weights: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of locations and weights; empty where not wanted."""
    grad_locations = torch.empty_like(locations) if wants_locations else grad.new_empty(0)
    grad_weights = torch.empty_like(weights) if wants_weights else grad.new_empty(0)
    if not wants_locations and not wants_weights:
        return grad_locations, grad_weights
    value = with_channels_together(value)
    batch, _, heads, dim = value.shape
    rows, levels, points = locations.shape[1] * heads, *locations.shape[3:5]
    constants = tile("samples_kernel", value)
    launch(
        samples_kernel, (batch * cdiv(rows, constants["BLOCK_R"]),),
        grad, value, locations, weights, grad_locations, grad_weights, odd(sides),
        rows, heads, dim, points, *value.stride()[:3],
        LEVELS=levels, LOCATIONS=wants_locations, WEIGHTS=wants_weights, ONE_TILE=dim <= constants["BLOCK_D"],
        **constants,
    )  # fmt: skip
    return grad_locations, grad_weights


def value_gradient(
    grad: Tensor, value: Tensor, sides: tuple[int, ...], locations: Tensor, weights: Tensor
) -> Tensor:
    """The gradient of value, which only gives its shape and dtype."""
    batch, pixels, heads, dim = value.shape
    rows, levels, points = locations.shape[1] * heads, *locations.shape[3:5]
    samples = weights.numel()
    grad_value = value.new_empty(value.shape)
    sizes = [(sides[2 * level], sides[2 * level + 1]) for level in range(levels)]
    cells = sum((height + 1) * (width + 1) for height, width in sizes)
    nowhere = batch * heads * cells
    keys = value.new_empty(samples, dtype=torch.int32 if nowhere < 2**31 else torch.int64)
    launch(
        keys_kernel, (cdiv(samples, KEYS_BLOCK),), locations, weights, keys, odd(sides),
        samples, rows, heads, points, cells, nowhere, LEVELS=levels, BLOCK=KEYS_BLOCK, num_warps=4,
    )  # fmt: skip
    if is_noting():  # nothing was written
        keys.copy_(noted_keys(locations, sizes, cells))
    keys, order = keys.sort(stable=True)
    starts = torch.searchsorted(keys, torch.arange(nowhere + 1, dtype=keys.dtype, device=keys.device))
    first_pixel = first_cell = 0
    for height, width in sizes:
        channels = min(power_of_2(dim), MOST_CHANNELS)
        # Of a pixel, were they spread evenly: four corners each.
        expected = 4 * locations.shape[1] * points / (height * width)
        density = "few" if expected <= 32 else "some" if expected <= 128 else "many"
        constants = config(
            "deformable_attention.gather_kernel",
            f"{dtype_class(value.dtype)}/{density}/d{channels}",
            value.device,
        )
        launch(
            gather_kernel, (batch * heads * height * width, cdiv(dim, channels)),
            grad, locations, weights, order, starts, grad_value, height, width, first_pixel, first_cell,
            pixels, cells, heads, dim, levels * points,
            WIDE=2 * samples >= 2**31, BLOCK_D=channels, **constants,
        )  # fmt: skip
        first_pixel += height * width
        first_cell += (height + 1) * (width + 1)
    return grad_value
