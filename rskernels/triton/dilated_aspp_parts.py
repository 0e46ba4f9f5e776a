"""What forward and backward of dilated_aspp share: branches, regions of maps, patches, and what is refused.

Shapes and names as in rskernels.triton.dilated_aspp.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rskernels.library import TRITON_DTYPES
from rskernels.triton.launch import cdiv, config, dot_precision, dtype_class, expect, power_of_2

LARGEST_DILATION = 2**30  # so that no offset of a tap passes 2^31


@dataclass(frozen=True)
class Branch:
    """x (pixels, inputs) and out (pixels, outputs) as rows any stride apart; weight (O, 3, 3, C), dense."""

    x: Tensor
    weight: Tensor
    out: Tensor
    dilation: int
    column: int = 0


@dataclass(frozen=True)
class Region:
    """The pixels of a launch: rows first_row … first_row + rows of `images` maps."""

    images: int
    height: int
    width: int
    first_row: int
    rows: int

    def patches(self, constants: Mapping[str, Any]) -> int:
        across = cdiv(self.width, constants["PATCH_W"])
        return self.images * cdiv(self.rows, constants["PATCH_H"]) * across


def pixels(x: Tensor) -> Tensor:
    """(B, C, h, w) as (B·h·w, C), in place where channels are neighbours and pixels evenly spaced."""
    x = x.permute(0, 2, 3, 1)
    _, height, width, channels = x.shape
    image, row, pixel, channel = x.stride()
    if (row, image) != (width * pixel, height * width * pixel) or (channel != 1 and channels > 1):
        return x.contiguous().flatten(0, 2)
    return x.as_strided((x.shape[0] * height * width, channels), (pixel, 1))


def packed(weight: Tensor) -> Tensor:
    """(O, 3, 3, C): the weight itself where its memory is channels-last."""
    return weight.permute(0, 2, 3, 1).contiguous()


@functools.cache
def patch_shape(rows: int, width: int, dilations: tuple[int, ...], pixels: int) -> tuple[int, int]:
    """Height and width of the patches of `pixels` that have the fewest taps to compute."""

    def taps(size: int, patch: int, dilation: int) -> int:
        return sum(
            1 + (min(first + patch, size) > dilation) + (first + dilation < size)
            for first in range(0, size, patch)
        )

    def cost(patch: int) -> int:
        return sum(taps(rows, pixels // patch, d) * taps(width, patch, d) for d in dilations)

    widths = [1 << i for i in range(pixels.bit_length())]
    best = min(reversed(widths), key=cost)
    return pixels // best, best


def channel_class(outputs: Sequence[int], inputs: Sequence[int]) -> str:
    """The part of a shape class that numbers of channels decide. Of channels that are no multiple of 16 the
    compiler loads and stores one at a time, each with an address: their tiles are small."""
    widest = min(power_of_2(max(outputs)), 128)
    odd = any(count % 16 for count in (*outputs, *inputs))
    return "odd" if odd and widest > 32 else f"o{widest}"


def constants_of(kernel: str, branches: Sequence[Branch], region: Region) -> dict[str, Any]:
    out = branches[0].out
    inputs = [branch.x.shape[1] for branch in branches]
    channels = channel_class([branch.out.shape[1] for branch in branches], inputs)
    tuned = config(f"dilated_aspp.{kernel}", f"{dtype_class(out.dtype)}/{channels}", out.device)
    dilations = tuple(branch.dilation for branch in branches)
    height, width = patch_shape(region.rows, region.width, dilations, tuned.pop("BLOCK_M"))
    precision = dot_precision(out.dtype, convolution=True)
    even = all(
        branch.x.shape[1] % tuned["BLOCK_K"] == 0 and branch.out.shape[1] % tuned["BLOCK_N"] == 0
        for branch in branches
    )
    side = {"PATCH_H": height, "PATCH_W": width}
    return {"COUNT": len(branches), "EVEN": even, **side, "PRECISION": precision, **tuned}


def check(
    name: str,
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    vectors: Mapping[str, Tensor | None],
    projection_weight: Tensor | None,
) -> None:
    """What the public function has refused already; an exported graph calls the operator itself. vectors: by
    name, one number for every channel of the concatenation."""
    counts = len(features), len(weights), len(dilations)
    if not weights or counts[1] != counts[2] or counts[0] not in (1, counts[1]):
        raise ValueError(
            f"{name}: got {counts[0]} features, {counts[1]} weights, {counts[2]} dilations; expected one of "
            "each per branch, or one feature map for all"
        )
    first = features[0]
    if first.dtype not in TRITON_DTYPES or first.dim() != 4:
        raise ValueError(
            f"{name}: features is {first.dtype} of shape {tuple(first.shape)}; expected float32, float16 or "
            "bfloat16 of 4 dimensions"
        )
    images, _, height, width = first.shape
    for i, (weight, dilation) in enumerate(zip(weights, dilations, strict=True)):
        x = features[i if len(features) > 1 else 0]
        inputs = x.shape[1] if x.dim() == 4 else 0
        expect(f"{name}: features", x, (images, inputs, height, width), first)
        expect(f"{name}: weights", weight, (len(weight), inputs, 3, 3), first)
        if min(inputs, height, width, len(weight)) < 1:
            raise ValueError(
                f"{name}: features has shape {tuple(x.shape)}, weights {tuple(weight.shape)}; expected "
                "nothing empty but the batch"
            )
        if not 1 <= dilation <= LARGEST_DILATION:
            raise ValueError(f"{name}: dilations has {dilation}; expected 1 to 2^30")
    channels = sum(len(weight) for weight in weights)
    for what, vector in vectors.items():
        if vector is not None:
            expect(f"{name}: {what}", vector, (channels,), first)
    if projection_weight is not None:
        expect(f"{name}: projection_weight", projection_weight, (len(projection_weight), channels), first)


def example_arguments(
    dtype: torch.dtype, images: int, side: int, channels: Sequence[int], outputs: int, projected: bool
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """Features, weights and the projection's weight of a pyramid on the meta device."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    features = [empty(images, c, side, side).to(memory_format=torch.channels_last) for c in channels]
    weights = [empty(outputs, c, 3, 3) for c in (tuple(channels) * 4 if len(channels) == 1 else channels)]
    return features, weights, empty(outputs, 4 * outputs) if projected else None


# Name, images, side, channels of the features, outputs of a branch, projected.
EXAMPLES: list[tuple[Any, ...]] = [
    ("head 256-1024, projected", 2, 32, (256, 512, 1024, 1024), 256, True),
    ("ASPP 2048", 2, 32, (2048,), 256, False),
    ("tiny head, projected", 2, 32, (64, 64, 64, 64), 64, True),
    ("narrow", 2, 32, (32,), 32, False),
    ("narrowest", 2, 32, (16,), 16, False),
    ("odd channels", 2, 31, (100,), 250, False),
    ("sizes of 1", 1, 1, (1,), 1, False),  # constants to the compiler
]


def examples_of(call: Callable[..., None]) -> Iterator[tuple[str, Callable[[], None]]]:
    """`call`, given a dtype and the rest of a row, for all of EXAMPLES; float32 without TF32 and with it."""

    def run(tf32: bool, *arguments: Any) -> None:
        switch: Any = getattr(torch.backends.cudnn, "conv", None)
        if not hasattr(switch, "fp32_precision"):  # PyTorch's older switch, of convolutions and RNNs together
            with torch.backends.cudnn.flags(allow_tf32=tf32):
                call(*arguments)
            return
        before, switch.fp32_precision = switch.fp32_precision, "tf32" if tf32 else "ieee"
        try:
            call(*arguments)
        finally:
            switch.fp32_precision = before

    kinds = (
        ("float32", torch.float32, False),
        ("tf32", torch.float32, True),
        ("bfloat16", torch.bfloat16, False),
    )
    for kind, dtype, tf32 in kinds:
        for name, *shape in EXAMPLES:
            yield f"{name}, {kind}", functools.partial(run, tf32, dtype, *shape)
