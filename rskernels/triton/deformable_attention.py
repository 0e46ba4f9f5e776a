"""deformable_attention on the GPU: what is sampled is summed at once, in registers, and never written.

Shapes: B batch, h heads, d head dim, L levels, S = sum of the levels' pixels, Q queries, P points per level.
A row is a query and head, (q, h) in this order; a sample is a row's point on a level. `sides` is height and
width of every level, one after the other, `odd_sides` the same as the kernels take them.

docs/kernels/deformable_attention.md explains the kernels; the backward pass is in
deformable_attention_backward.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from rskernels.library import TRITON_DTYPES
from rskernels.triton.deformable_attention_backward import sample_gradients, value_gradient
from rskernels.triton.deformable_attention_tiles import corner, level_size, odd, sample_place, tile
from rskernels.triton.launch import cdiv, launch, meaningful, with_channels_together


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    value, locations, weights, out, odd_sides,
    rows, heads, dim, points, batch_stride, pixel_stride, head_stride,
    LEVELS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The output of one tile of rows and channels. rows: Q·h, of one image."""
    blocks = tl.cdiv(rows, BLOCK_R)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_in = row < rows
    channels = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    channels_in = channels < dim
    level_at = value + batch * batch_stride + (row % heads).to(tl.int64) * head_stride
    row = batch * rows + row
    sample = row * (LEVELS * points)
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for level in tl.static_range(LEVELS):
        height, width = level_size(odd_sides, level)
        for point in range(points):
            x, y, right, down, weight, spoiled = sample_place(
                locations, weights, sample + point, row_in, height, width
            )
            weight += spoiled
            upper, lower = weight * (1 - down), weight * down
            total += (upper * (1 - right))[:, None] * corner(
                level_at, x, y, row_in, channels, channels_in, height, width, pixel_stride
            )
            total += (upper * right)[:, None] * corner(
                level_at, x + 1, y, row_in, channels, channels_in, height, width, pixel_stride
            )
            total += (lower * (1 - right))[:, None] * corner(
                level_at, x, y + 1, row_in, channels, channels_in, height, width, pixel_stride
            )
            total += (lower * right)[:, None] * corner(
                level_at, x + 1, y + 1, row_in, channels, channels_in, height, width, pixel_stride
            )
        sample += points
        level_at += tl.full((), 1, tl.int64) * height * width * pixel_stride
    to = out + row[:, None] * dim + channels[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=row_in[:, None] & channels_in[None, :])


def check(name: str, value: Tensor, sides: Sequence[int], locations: Tensor, weights: Tensor) -> None:
    """What the public function has refused already; an exported graph calls the operator itself."""
    shape = tuple(locations.shape)
    levels = len(sides) // 2
    pixels = sum(sides[2 * level] * sides[2 * level + 1] for level in range(levels))
    if len(sides) != 2 * levels or levels == 0 or min(sides) < 1:
        raise ValueError(
            f"{name}: sides is {list(sides)}; expected height and width of every level, at least 1"
        )
    if value.dim() != 4 or value.shape[1] != pixels:
        raise ValueError(
            f"{name}: value has shape {tuple(value.shape)}; expected (B, {pixels}, h, d) for "
            f"sides {list(sides)}"
        )
    batch, _, heads, _ = value.shape
    if len(shape) != 6 or (shape[0], *shape[2:4], shape[5]) != (batch, heads, levels, 2):
        raise ValueError(
            f"{name}: sampling_locations has shape {shape}; expected ({batch}, Q, {heads}, {levels}, P, 2)"
        )
    if weights.shape != shape[:-1]:
        raise ValueError(f"{name}: attention_weights has shape {tuple(weights.shape)}; expected {shape[:-1]}")
    for what, tensor in (
        ("value", value),
        ("sampling_locations", locations),
        ("attention_weights", weights),
    ):
        if tensor.dtype not in TRITON_DTYPES or tensor.device != value.device:
            raise ValueError(
                f"{name}: {what} is {tensor.dtype} on {tensor.device}; expected float32, float16 or bfloat16 "
                f"on {value.device}"
            )


def forward(
    value: Tensor, sides: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """(B, Q, h·d), as the operator deformable_attention_forward returns it."""
    check("deformable_attention_forward", value, sides, sampling_locations, attention_weights)
    value = with_channels_together(value)
    batch, _, heads, dim = value.shape
    rows, levels, points = sampling_locations.shape[1] * heads, *sampling_locations.shape[3:5]
    out = value.new_empty(batch, sampling_locations.shape[1], heads * dim)
    constants = tile("forward_kernel", value)
    grid = (batch * cdiv(rows, constants["BLOCK_R"]), cdiv(dim, constants["BLOCK_D"]))
    launch(
        forward_kernel, grid, value, sampling_locations.contiguous(), attention_weights.contiguous(), out,
        odd(sides), rows, heads, dim, points, *value.stride()[:3], LEVELS=levels, **constants,
    )  # fmt: skip
    return out


def backward(
    grad: Tensor,
    value: Tensor,
    sides: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The three gradients, as the operator deformable_attention_backward returns them."""
    check("deformable_attention_backward", value, sides, sampling_locations, attention_weights)
    expected = (value.shape[0], sampling_locations.shape[1], value.shape[2] * value.shape[3])
    if grad.shape != expected or grad.dtype not in TRITON_DTYPES:
        raise ValueError(
            f"deformable_attention_backward: grad is {grad.dtype} of shape {tuple(grad.shape)}; expected "
            f"float32, float16 or bfloat16 of shape {expected}"
        )
    call = (
        grad.contiguous(),
        value,
        tuple(sides),
        sampling_locations.contiguous(),
        attention_weights.contiguous(),
    )
    grad_value = value_gradient(*call) if mask[0] else grad.new_empty(0)
    return grad_value, *sample_gradients(*call, mask[1], mask[2])


def candidates(kernel: str, shape_class: str) -> list[dict[str, int]]:
    """Configurations worth a trial on a chip: tiles of 512 to 4096 values."""
    if kernel == "gather_kernel":
        slots = {"few": (16, 32), "some": (32, 64), "many": (64, 128)}[shape_class.split("/")[1]]
        return [{"BLOCK_K": k, "num_warps": w, "num_stages": 1} for k in slots for w in (1, 2, 4, 8)]
    channels = int(shape_class.rsplit("/d", 1)[1])
    rows = [r for r in (8, 16, 32, 64) if 512 <= r * channels <= 4096] or [4]
    return [{"BLOCK_R": r, "num_warps": w, "num_stages": 1} for r in rows for w in (2, 4, 8)]


def sampled(levels: tuple[tuple[int, int], ...], queries: int, heads: int, points: int) -> Tensor:
    """Locations as a model's: about two pixels of their level from their query's place in the image."""
    generator = torch.Generator().manual_seed(queries)
    offsets = torch.randn(2, queries, heads, len(levels), points, 2, generator=generator)
    sides = torch.tensor([(width, height) for height, width in levels])
    along = math.ceil(math.sqrt(queries))
    query = torch.arange(queries)
    places = torch.stack([query % along, query // along], -1).add(0.5).div(along)
    locations = places[:, None, None, None] + 2 * offsets / sides[:, None]
    return meaningful(locations.clamp(0, 1))


def examples() -> Iterator[tuple[str, Callable[[], None]]]:
    """Mask2Former's pixel decoder, ViT-Adapter's extractor, and a shape of every other head dim's class."""

    def call(
        levels: tuple[tuple[int, int], ...],
        queries: int,
        heads: int,
        dim: int,
        points: int,
        dtype: torch.dtype,
    ) -> None:
        sides = [side for level in levels for side in level]
        pixels = sum(height * width for height, width in levels)
        value = torch.empty(2, pixels, heads, dim, dtype=dtype)
        locations = sampled(levels, queries, heads, points)
        weights = torch.empty(locations.shape[:-1])
        out = forward(value, sides, locations, weights)
        backward(out, value, sides, locations, weights, [True] * 3)

    pyramid = ((16, 16), (32, 32), (64, 64))
    calls = {
        "pixel decoder": (pyramid, 5376, 8, 32, 4),
        "extractor": (((32, 32),), 5376, 6, 64, 4),
        "d16": (((32, 32), (16, 16)), 100, 8, 16, 4),
        "d128": (((32, 32), (16, 16)), 100, 2, 128, 4),
        "d256": (((32, 32), (16, 16)), 100, 1, 256, 4),
        "d320": (((14, 14),), 196, 1, 320, 1),
        "levels of one row": (((1, 13), (1, 1)), 30, 2, 16, 2),
        "sizes of 1": (((1, 1),), 1, 1, 1, 1),  # constants to the compiler
    }
    for dtype in (torch.float32, torch.bfloat16):
        for name, shape in calls.items():
            yield f"{name} {str(dtype)[6:]}", partial(call, *shape, dtype)
