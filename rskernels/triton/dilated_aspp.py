"""dilated_aspp forward: implicit GEMM over the taps of dilated 3x3 convolutions, all branches in one launch.

Maps are rows of pixels (B·h·w, channels), weights (O, 3, 3, C). A program computes a patch of pixels for a
block of outputs, and leaves out the taps that reach the map from no pixel of its patch. The gradient of a map
is the same kernel with the taps turned round: dilated_aspp_backward.py. Why it is so: docs/kernels/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rskernels.triton.dilated_aspp_parts import (
    Branch,
    Region,
    check,
    constants_of,
    example_arguments,
    examples_of,
    packed,
    pixels,
)
from rskernels.triton.launch import cdiv, expect, launch

# With a projection the concatenation exists for this many bytes of pixels at a time: it stays in the cache of
# the chip (40 MB and more), and still fills it with programs.
SLAB_BYTES = 16 * 2**20


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """NaN stays NaN."""
    if ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x


@triton.jit
def _patch(tile, rows, width, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr):
    """Image, first row and first column of a patch."""
    across, down = tl.cdiv(width, PATCH_W), tl.cdiv(rows, PATCH_H)
    return tile // (across * down), tile // across % down * PATCH_H, tile % across * PATCH_W


@triton.jit
def add_taps(
    total, x, w, tile, block, height, width, first_row, rows, x_pixel, inputs, outputs, dilation,
    TRANSPOSED: tl.constexpr, EVEN: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + the sum over taps and inputs of one branch, for one patch and one block of outputs."""
    image, top, left = _patch(tile, rows, width, PATCH_H, PATCH_W)
    bottom = first_row + tl.minimum(top + PATCH_H, rows) - 1
    right = tl.minimum(left + PATCH_W, width) - 1
    top += first_row
    member = tl.arange(0, PATCH_H * PATCH_W)
    y, column = top + member // PATCH_W, left + member % PATCH_W
    output = block * BLOCK_N + tl.arange(0, BLOCK_N)
    has_output = output < outputs
    k = tl.arange(0, BLOCK_K)
    # What the loop moves are scalars: the pointers of a tap's next inputs, or of the next tap, all lie at one
    # distance from these. It divides nothing.
    pixel = (image.to(tl.int64) * height + y) * width + column
    x_at = x + pixel[:, None] * x_pixel + k[None, :]
    if TRANSPOSED:
        w_at = w + k[:, None] * (9 * outputs) + output[None, :]
    else:
        w_at = w + k[:, None] + output[None, :] * (9 * inputs)
    # The taps that reach the map from somewhere in the patch: a rectangle around the middle one.
    first_ky, last_ky = tl.where(bottom < dilation, 1, 0), tl.where(top + dilation < height, 2, 1)
    first_kx, last_kx = tl.where(right < dilation, 1, 0), tl.where(left + dilation < width, 2, 1)
    taps = (last_ky - first_ky + 1) * (last_kx - first_kx + 1)
    ky, kx, first = first_ky, first_kx, 0
    for _ in range(0, taps * tl.cdiv(inputs, BLOCK_K)):
        down, right = (ky - 1) * dilation, (kx - 1) * dilation
        from_y, from_x = y + down, column + right
        inside = (from_y >= 0) & (from_y < height) & (from_x >= 0) & (from_x < width)
        x_next = x_at + (tl.cast(down * width + right, tl.int64) * x_pixel + first)
        if TRANSPOSED:
            w_next = w_at + (8 - 3 * ky - kx + 9 * first) * outputs
        else:
            w_next = w_at + ((3 * ky + kx) * inputs + first)
        if EVEN:
            x_tile = tl.load(x_next, mask=inside[:, None], other=0.0)
            w_tile = tl.load(w_next)
        else:
            has_k = first + k < inputs
            x_tile = tl.load(x_next, mask=inside[:, None] & has_k[None, :], other=0.0)
            w_tile = tl.load(w_next, mask=has_k[:, None] & has_output[None, :], other=0.0)
        total = tl.dot(x_tile, w_tile, total, input_precision=PRECISION)
        first += BLOCK_K
        end_of_tap = first >= inputs
        end_of_row = end_of_tap & (kx == last_kx)
        first = tl.where(end_of_tap, 0, first)
        kx = tl.where(end_of_row, first_kx, tl.where(end_of_tap, kx + 1, kx))
        ky = tl.where(end_of_row, ky + 1, ky)
    return total


@triton.jit
def finish(
    total, out, bias, scale, shift, kept, tile, block, width, rows, outputs, column, out_pixel, kept_pixel,
    ACTIVATION: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Bias, scale and shift, activation, and into the branch's slice; `column` is where that begins."""
    image, top, left = _patch(tile, rows, width, PATCH_H, PATCH_W)
    member = tl.arange(0, PATCH_H * PATCH_W)
    y, x = top + member // PATCH_W, left + member % PATCH_W
    pixel = (image.to(tl.int64) * rows + y) * width + x
    output = block * BLOCK_N + tl.arange(0, BLOCK_N)
    has_output = output < outputs
    mask = ((y < rows) & (x < width))[:, None] & has_output[None, :]
    if bias is not None:
        total += tl.load(bias + column + output, mask=has_output, other=0.0).to(tl.float32)[None, :]
    if scale is not None:
        total *= tl.load(scale + column + output, mask=has_output, other=0.0).to(tl.float32)[None, :]
        total += tl.load(shift + column + output, mask=has_output, other=0.0).to(tl.float32)[None, :]
    if kept is not None:
        kept_at = kept + pixel[:, None] * kept_pixel + (column + output)[None, :]
        tl.store(kept_at, total.to(kept.dtype.element_ty), mask=mask)
    at = out + pixel[:, None] * out_pixel + output[None, :]
    tl.store(at, activate(total, ACTIVATION).to(out.dtype.element_ty), mask=mask)


@triton.jit
def convolve(
    maps, weights, outs, bias, scale, shift, kept, tiles, height, width, first_row, rows,
    map_pixels, inputs, outputs, dilations, columns, out_pixels, kept_pixel,
    COUNT: tl.constexpr, TRANSPOSED: tl.constexpr, EVEN: tl.constexpr, ACTIVATION: tl.constexpr,
    PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """COUNT branches, each into its own out. The loop is unrolled: of a pointer chosen while running the
    compiler would not know how it is aligned."""
    program = tl.program_id(0)
    for i in tl.static_range(COUNT):
        blocks = tl.cdiv(outputs[i], BLOCK_N)
        if (program >= 0) & (program < tiles * blocks):  # it is one of this branch's
            tile, block = program // blocks, program % blocks
            total = tl.zeros((PATCH_H * PATCH_W, BLOCK_N), tl.float32)
            total = add_taps(
                total, maps[i], weights[i], tile, block, height, width, first_row, rows, map_pixels[i],
                inputs[i], outputs[i], dilations[i],
                TRANSPOSED, EVEN, PATCH_H, PATCH_W, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
            finish(
                total, outs[i], bias, scale, shift, kept, tile, block, width, rows, outputs[i], columns[i],
                out_pixels[i], kept_pixel, ACTIVATION, PATCH_H, PATCH_W, BLOCK_N,
            )  # fmt: skip
        program -= tiles * blocks


def run_branches(
    branches: Sequence[Branch],
    region: Region,
    *,
    transposed: bool = False,
    activation: str = "none",
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    kept: Tensor | None = None,
) -> None:
    """Each branch into its own out. kept: (pixels, all channels), what enters the activation."""
    if not branches:
        return
    # Those with most to do come first, so that the last programs are short.
    branches = sorted(branches, key=lambda branch: -branch.x.shape[1])
    constants = constants_of("convolve", branches, region)
    tiles = region.patches(constants)
    launch(
        convolve,
        (tiles * sum(cdiv(branch.out.shape[1], constants["BLOCK_N"]) for branch in branches),),
        tuple(branch.x for branch in branches), tuple(branch.weight for branch in branches),
        tuple(branch.out for branch in branches), bias, scale, shift, kept,
        tiles, region.height, region.width, region.first_row, region.rows,
        tuple(branch.x.stride(0) for branch in branches), tuple(branch.x.shape[1] for branch in branches),
        tuple(branch.out.shape[1] for branch in branches), tuple(branch.dilation for branch in branches),
        tuple(branch.column for branch in branches), tuple(branch.out.stride(0) for branch in branches),
        0 if kept is None else kept.stride(0),
        TRANSPOSED=transposed, ACTIVATION=activation, **constants,
    )  # fmt: skip


def forward(
    features: list[Tensor],
    weights: list[Tensor],
    bias: Tensor | None,
    dilations: list[int],
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    projection_weight: Tensor | None,
    projection_bias: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """rskernels::dilated_aspp_forward: the output in channels-last memory, and what enters the activation."""
    name, vectors = "dilated_aspp_forward", {"bias": bias, "scale": scale, "shift": shift}
    check(name, features, weights, dilations, vectors, projection_weight)
    if projection_bias is not None and projection_weight is not None:
        expect(f"{name}: projection_bias", projection_bias, projection_weight.shape[:1], features[0])
    images, _, height, width = features[0].shape
    maps = [pixels(x) for x in features]
    maps = maps * len(weights) if len(maps) == 1 else maps
    taps = [packed(weight) for weight in weights]
    ends = [0]
    for weight in weights:
        ends.append(ends[-1] + len(weight))
    channels = ends[-1]
    kept = features[0].new_empty((images, height, width, channels) if keep else 0)
    bias, scale, shift = (None if t is None else t.contiguous() for t in (bias, scale, shift))

    def convolve_into(out: Tensor, region: Region, first: int) -> None:
        """`first`: the number of the region's first pixel's image times the size of a map."""
        branches = [
            Branch(x[first:], tap, out[:, begin:end], dilation, begin)
            for x, tap, dilation, begin, end in zip(maps, taps, dilations, ends[:-1], ends[1:], strict=True)
        ]
        start = first + region.first_row * width
        rows = kept.view(-1, channels)[start:] if keep else None
        run_branches(branches, region, activation=activation, bias=bias, scale=scale, shift=shift, kept=rows)

    if projection_weight is None:
        out = features[0].new_empty(images, height, width, channels)
        convolve_into(out.view(-1, channels), Region(images, height, width, 0, height), 0)
        return out.permute(0, 3, 1, 2), kept
    out = features[0].new_empty(images, height, width, len(projection_weight))
    out_rows = out.view(-1, len(projection_weight))
    for image, region in _slabs(images, height, width, channels * out.element_size()):
        first, count = image * height * width, region.images * region.rows * width
        concatenation = out.new_empty(count, channels)
        convolve_into(concatenation, region, first)
        start = first + region.first_row * width
        project(concatenation, projection_weight, projection_bias, out_rows[start : start + count])
    return out.permute(0, 3, 1, 2), kept


def project(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = x weightᵀ + bias, cuBLAS's."""
    if bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)


def _slabs(images: int, height: int, width: int, pixel_bytes: int) -> Iterator[tuple[int, Region]]:
    """First image and region of pieces of at most SLAB_BYTES: some images, or some rows of one."""
    most = max(1, SLAB_BYTES // max(1, pixel_bytes))
    if most >= height * width:
        step = most // (height * width)
        for image in range(0, images, step):
            yield image, Region(min(step, images - image), height, width, 0, height)
        return
    step = max(1, most // width)
    for image in range(images):
        for row in range(0, height, step):
            yield image, Region(1, height, width, row, min(step, height - row))


def candidates(kernel: str, shape_class: str) -> list[dict[str, int]]:
    """Configurations that the tuner tries for `kernel` ("convolve") and `shape_class` ("half/o128")."""
    dtype, outputs = shape_class.split("/")
    n, ks = 64 if outputs == "odd" else int(outputs[1:]), (32,) if dtype == "float" else (32, 64)
    return [
        {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
        for m in ((64,) if dtype == "float" else (64, 128))
        for k in ks
        for warps, stages in ((4, 2), (4, 3), (8, 3))
    ]


def examples() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls with the shapes of the heads; nothing is computed on the meta device."""

    def call(dtype: torch.dtype, *shape: Any) -> None:
        features, weights, projection = example_arguments(dtype, *shape)
        *_, outputs, projected = shape
        bias = features[0].new_empty(4 * outputs)
        activation, folded = ("gelu", None) if projected else ("relu", bias)
        forward(
            features, weights, bias, [1, 6, 12, 18], folded, folded, activation, projection,
            None if projection is None else features[0].new_empty(outputs), projected,
        )  # fmt: skip

    return examples_of(call)
