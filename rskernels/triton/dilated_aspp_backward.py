"""dilated_aspp backward: through the activation, then the transposed convolutions and the weights' gradients.

The projection's gradients are PyTorch's products. Sums over pixels are cut by shape alone and added in order.
docs/kernels/dilated_aspp.md has the design.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rskernels.triton.dilated_aspp import activate, add_taps, finish, run_branches
from rskernels.triton.dilated_aspp import candidates as convolve_candidates
from rskernels.triton.dilated_aspp_parts import (
    Branch,
    Region,
    channel_class,
    check,
    constants_of,
    example_arguments,
    examples_of,
    packed,
    pixels,
)
from rskernels.triton.launch import cdiv, config, dot_precision, dtype_class, expect, launch

# Slices of the sums over pixels: of a bias's, and of a weight's where its tiles alone are too few for a chip.
BIAS_PIXELS, BIAS_SLICES = 64, 256
WEIGHT_TILES, WEIGHT_PIXELS, WEIGHT_SLICES = 264, 512, 16


@triton.jit
def convolve_sum(
    maps, weights, out, tiles, height, width, first_row, rows,
    map_pixels, inputs, outputs, dilations, out_pixel,
    COUNT: tl.constexpr, TRANSPOSED: tl.constexpr, EVEN: tl.constexpr, PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sum of COUNT branches: what a map that they share gets as gradient."""
    blocks = tl.cdiv(outputs, BLOCK_N)
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    total = tl.zeros((PATCH_H * PATCH_W, BLOCK_N), tl.float32)
    for i in tl.static_range(COUNT):
        total = add_taps(
            total, maps[i], weights[i], tile, block, height, width, first_row, rows, map_pixels[i], inputs[i],
            outputs, dilations[i], TRANSPOSED, EVEN, PATCH_H, PATCH_W, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
    finish(
        total, out, None, None, None, None, tile, block, width, rows, outputs, 0, out_pixel, 0,
        "none", PATCH_H, PATCH_W, BLOCK_N,
    )  # fmt: skip


@triton.jit
def _derivative(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        x = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    if ACTIVATION == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        x = s + x * s * (1.0 - s) * (1.5957691216057308 * (1.0 + 0.134145 * x * x))
    return x


@triton.jit
def pass_activation(
    grad, saved, scale, d_pre, activated, partial, count, slice_pixels, channels,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """d_pre = grad · activation'(saved) · scale, and beside it activation(saved) and sums of d_pre by slice.
    `saved` is what entered the activation; for relu its result serves as well."""
    channel = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    has_channel = channel < channels
    first = tl.program_id(1).to(tl.int64) * slice_pixels
    last = tl.minimum(first + slice_pixels, count)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, last, BLOCK_M):
        pixel = start + tl.arange(0, BLOCK_M).to(tl.int64)
        at = pixel[:, None] * channels + channel[None, :]
        mask = (pixel < last)[:, None] & has_channel[None, :]
        value = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        if saved is not None:
            entered = tl.load(saved + at, mask=mask, other=0.0).to(tl.float32)
            if ACTIVATION == "relu":
                value = tl.where(entered <= 0, 0.0, value)
            elif ACTIVATION != "none":
                value *= _derivative(entered, ACTIVATION)
            if activated is not None:
                tl.store(
                    activated + at, activate(entered, ACTIVATION).to(activated.dtype.element_ty), mask=mask
                )
        if scale is not None:
            value *= tl.load(scale + channel, mask=has_channel, other=0.0).to(tl.float32)[None, :]
        if d_pre is not None:
            tl.store(d_pre + at, value.to(d_pre.dtype.element_ty), mask=mask)
        total += value
    if partial is not None:
        tl.store(partial + tl.program_id(1) * channels + channel, tl.sum(total, 0), mask=has_channel)


@triton.jit
def weight_gradient(
    d_pre, x, partial, images, height, width, slices, outputs, inputs, dilation, d_pixel, x_pixel,
    BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partial (slices, O, 9, C): of one tap, the sum over the pixels whose input lies inside the map."""
    blocks_c = tl.cdiv(inputs, BLOCK_C)
    block = tl.program_id(0)
    tap, block = block % 9, block // 9
    output = block // blocks_c * BLOCK_O + tl.arange(0, BLOCK_O)
    channel = block % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    has_output, has_channel = output < outputs, channel < inputs
    down, right = (tap // 3 - 1) * dilation, (tap % 3 - 1) * dilation
    top, left = tl.maximum(-down, 0), tl.maximum(-right, 0)
    rows = tl.maximum(height - tl.abs(down), 0)
    columns = tl.maximum(width - tl.abs(right), 0)
    count = images * rows * columns
    slice_pixels = tl.cdiv(count, slices)
    first = tl.program_id(1) * slice_pixels
    last = tl.minimum(first + slice_pixels, count)
    total = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
    # The rectangle's pixels row by row. A step moves each by as many images, rows and columns; past the right
    # or lower edge of the rectangle it skips what lies outside. Divisions are done here only.
    rows, columns = tl.maximum(rows, 1), tl.maximum(columns, 1)
    i = first + tl.arange(0, BLOCK_K)
    row, column = i // columns, i % columns
    y = row % rows
    pixel = (row // rows * height + top + y) * width + left + column
    down_step, right_step = BLOCK_K // columns, BLOCK_K % columns
    y_step = down_step % rows
    step = (down_step // rows * height + y_step) * width + right_step
    for start in range(first, last, BLOCK_K):
        has_pixel = start + tl.arange(0, BLOCK_K) < last
        d_at = d_pre + pixel.to(tl.int64)[:, None] * d_pixel + output[None, :]
        d_tile = tl.load(d_at, mask=has_pixel[:, None] & has_output[None, :], other=0.0)
        x_at = x + (pixel + down * width + right).to(tl.int64)[:, None] * x_pixel + channel[None, :]
        x_tile = tl.load(x_at, mask=has_pixel[:, None] & has_channel[None, :], other=0.0)
        total = tl.dot(tl.trans(d_tile), x_tile, total, input_precision=PRECISION)
        column += right_step
        past_right = column >= columns
        y += y_step + past_right.to(tl.int32)
        past_bottom = y >= rows
        pixel += step + tl.where(past_right, width - columns, 0)
        pixel += tl.where(past_bottom, (height - rows) * width, 0)
        column = tl.where(past_right, column - columns, column)
        y = tl.where(past_bottom, y - rows, y)
    row = tl.program_id(1).to(tl.int64) * outputs + output
    at = partial + (row * 9 + tap)[:, None] * inputs + channel[None, :]
    tl.store(at, total.to(partial.dtype.element_ty), mask=has_output[:, None] & has_channel[None, :])


@triton.jit
def finish_weight(partial, dw, slices, outputs, inputs, BLOCK_C: tl.constexpr):
    """The slices in order, from (O, 9, C) to the weight's own (O, C, 3, 3)."""
    blocks = tl.cdiv(inputs, BLOCK_C)
    output = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    tap = tl.arange(0, 16)
    mask = (tap < 9)[:, None] & (channel < inputs)[None, :]
    at = partial + (output * 9 + tap)[:, None] * inputs + channel[None, :]
    total = tl.zeros((16, BLOCK_C), tl.float32)
    for _ in range(slices):
        total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        at += outputs * 9 * inputs
    to = dw + (output * inputs + channel)[None, :] * 9 + tap[:, None]
    tl.store(to, total.to(dw.dtype.element_ty), mask=mask)


def backward(
    grad: Tensor,
    features: list[Tensor],
    weights: list[Tensor],
    kept: Tensor,
    scale: Tensor | None,
    projection_weight: Tensor | None,
    dilations: list[int],
    activation: str,
    mask: list[bool],
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:
    """rskernels::dilated_aspp_backward: empty tensors for the gradients that nobody asks for."""
    check("dilated_aspp_backward", features, weights, dilations, {"scale": scale}, projection_weight)
    images, _, height, width = features[0].shape
    channels = sum(len(weight) for weight in weights)
    outputs = channels if projection_weight is None else len(projection_weight)
    expect("dilated_aspp_backward: grad", grad, (images, outputs, height, width), features[0])
    if kept.dim() == 4:
        expect("dilated_aspp_backward: kept", kept, (images, height, width, channels), features[0])
    wants_maps, wants_weights = mask[: len(features)], mask[len(features) : -3]
    wants_bias, wants_projection, wants_projection_bias = mask[-3:]
    rows = pixels(grad).contiguous()
    d_projection, d_projection_bias = grad.new_empty(0), grad.new_empty(0)
    if wants_projection_bias:
        d_projection_bias = rows.sum(0)
    through = rows if projection_weight is None else rows @ projection_weight
    saved = pixels(kept.permute(0, 3, 1, 2)).contiguous() if kept.dim() == 4 else None
    activated = through.new_empty(through.shape) if wants_projection and activation != "none" else None
    wants_pre = any(wants_maps) or any(wants_weights)
    scale = None if scale is None else scale.contiguous()
    d_pre, d_bias = _pass_activation(through, saved, scale, activated, activation, wants_pre, wants_bias)
    if wants_projection:
        entered = saved if activated is None else activated
        assert entered is not None  # with a projection what enters the activation is always kept
        d_projection = rows.T @ entered
    slices = d_pre.split([len(weight) for weight in weights], 1) if wants_pre else [d_pre] * len(weights)
    d_maps = _map_gradients(features, weights, slices, dilations, wants_maps)
    d_weights = [
        _weight_gradient(part, x, weight, dilation) if wanted else grad.new_empty(0)
        for part, x, weight, dilation, wanted in zip(
            slices, features * (len(weights) // len(features)), weights, dilations, wants_weights, strict=True
        )
    ]
    return d_maps, d_weights, d_bias, d_projection, d_projection_bias


def _pass_activation(
    grad: Tensor,
    saved: Tensor | None,
    scale: Tensor | None,
    activated: Tensor | None,
    activation: str,
    wants_pre: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient of the convolutions, (pixels, channels), and of their biases."""
    same = activation == "none" and scale is None
    count, channels = grad.shape
    d_pre = grad.new_empty(grad.shape) if wants_pre and not same else None
    slices = max(1, min(BIAS_SLICES, cdiv(count, BIAS_PIXELS)))
    partial = grad.new_empty((slices, channels), dtype=torch.float32) if wants_bias else None
    if d_pre is not None or partial is not None or activated is not None:
        tuned = config("dilated_aspp_backward.pass_activation", dtype_class(grad.dtype), grad.device)
        launch(
            pass_activation,
            (cdiv(channels, tuned["BLOCK_N"]), slices),
            grad, None if activation == "none" else saved, scale, d_pre, activated, partial,
            count, cdiv(count, slices), channels,
            ACTIVATION=activation, **tuned,
        )  # fmt: skip
    d_bias = grad.new_empty(0) if partial is None else partial.sum(0).to(grad.dtype)
    return grad if d_pre is None else d_pre, d_bias


def _map_gradients(
    features: list[Tensor],
    weights: list[Tensor],
    slices: Sequence[Tensor],
    dilations: list[int],
    wanted: list[bool],
) -> list[Tensor]:
    """In channels-last memory; a map that all branches share gets the sum of theirs."""
    found, branches = [], []
    images, _, height, width = features[0].shape
    region = Region(images, height, width, 0, height)
    parts = list(zip(slices, weights, dilations, strict=True))
    for i, x in enumerate(features):
        if not wanted[i]:
            found.append(x.new_empty(0))
            continue
        out = x.new_empty(images, height, width, x.shape[1])
        rows = out.view(-1, x.shape[1])
        found.append(out.permute(0, 3, 1, 2))
        readers = parts if len(features) == 1 else parts[i : i + 1]
        group = [Branch(part, packed(weight), rows, dilation) for part, weight, dilation in readers]
        if len(group) == 1:
            branches += group
        else:
            _sum_branches(group, region)
    run_branches(branches, region, transposed=True)
    return found


def _sum_branches(branches: list[Branch], region: Region) -> None:
    out = branches[0].out
    constants = constants_of("convolve_sum", branches, region)
    tiles = region.patches(constants)
    launch(
        convolve_sum,
        (tiles * cdiv(out.shape[1], constants["BLOCK_N"]),),
        tuple(branch.x for branch in branches), tuple(branch.weight for branch in branches), out,
        tiles, region.height, region.width, region.first_row, region.rows,
        tuple(branch.x.stride(0) for branch in branches), tuple(branch.x.shape[1] for branch in branches),
        out.shape[1], tuple(branch.dilation for branch in branches), out.stride(0),
        TRANSPOSED=True, **constants,
    )  # fmt: skip


def _weight_gradient(d_pre: Tensor, x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """(O, C, 3, 3) of one branch from its columns of the convolutions' gradient and its map."""
    outputs, inputs = weight.shape[:2]
    images, _, height, width = x.shape
    tiles = 9 * cdiv(outputs, 128) * cdiv(inputs, 128)
    slices = min(
        cdiv(WEIGHT_TILES, max(tiles, 1)), cdiv(images * height * width, WEIGHT_PIXELS), WEIGHT_SLICES
    )
    slices = max(slices, 1)
    # Rounded once: on the way to the sum of one slice, or after the sum of several.
    dtype = weight.dtype if slices == 1 else torch.float32
    partial = weight.new_empty((slices, outputs, 9, inputs), dtype=dtype)
    shape_class = f"{dtype_class(weight.dtype)}/{channel_class([outputs], [inputs])}"
    tuned = config("dilated_aspp_backward.weight_gradient", shape_class, x.device)
    rows = pixels(x)
    launch(
        weight_gradient,
        (9 * cdiv(outputs, tuned["BLOCK_O"]) * cdiv(inputs, tuned["BLOCK_C"]), slices),
        d_pre, rows, partial, images, height, width, slices, outputs, inputs, dilation,
        d_pre.stride(0), rows.stride(0),
        PRECISION=dot_precision(weight.dtype, convolution=True), **tuned,
    )  # fmt: skip
    dw = weight.new_empty(weight.shape)
    tuned = config("dilated_aspp_backward.finish_weight", dtype_class(weight.dtype), x.device)
    blocks = outputs * cdiv(inputs, tuned["BLOCK_C"])
    launch(finish_weight, (blocks,), partial, dw, slices, outputs, inputs, **tuned)
    return dw


def candidates(kernel: str, shape_class: str) -> list[dict[str, int]]:
    """Configurations that the tuner tries for `kernel` ("convolve_sum") and `shape_class` ("half/o128")."""
    if kernel == "pass_activation":
        return [
            {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps}
            for m in (16, 32)
            for n in (64, 128)
            for warps in (4, 8)
        ]
    if kernel == "finish_weight":
        return [{"BLOCK_C": c, "num_warps": warps} for c in (64, 128, 256) for warps in (2, 4)]
    if kernel in ("convolve", "convolve_sum"):
        return convolve_candidates(kernel, shape_class)
    dtype, outputs = shape_class.split("/")
    widest = 64 if dtype == "float" or outputs == "odd" else 128
    n = widest if outputs == "odd" else min(int(outputs[1:]), widest)
    return [
        {"BLOCK_O": n, "BLOCK_C": c, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
        for c in (64, 128)
        for k in (32, 64)
        for warps, stages in ((4, 2), (4, 3), (8, 3))
    ]


def examples() -> Iterator[tuple[str, Callable[[], Any]]]:
    """The backward calls of the heads in dilated_aspp.EXAMPLES."""

    def call(dtype: torch.dtype, *shape: Any) -> None:
        features, weights, projection = example_arguments(dtype, *shape)
        images, side, _, outputs, projected = shape
        kept = features[0].new_empty(images, side, side, 4 * outputs)
        grad = kept[..., : outputs if projected else 4 * outputs].contiguous().permute(0, 3, 1, 2)
        mask = [True] * (len(features) + 5) + [projected] * 2
        activation = "gelu" if projected else "relu"
        backward(grad, features, weights, kept, None, projection, [1, 6, 12, 18], activation, mask)

    return examples_of(call)
