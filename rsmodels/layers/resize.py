"""Bilinear resizing of maps, and 3x3 convolutions of maps that were resized, without their full size.

Shapes: B batch, C channels, D output channels, h/w a map, H/W the map resized.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import rskernels


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, ·, ·) → (B, C, *size), bilinear; nothing is done where the size is right."""
    if x.shape[-2:] == torch.Size(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def conv_of_resized(x: Tensor, size: Sequence[int], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """conv2d(resize(x, size), weight, bias, padding=1), up to rounding: (B, C, h, w) → (B, D, H, W).

    Resizing and convolving are linear, and resizing treats channels alike: the nine taps of the kernel are
    applied to the small map, and what they give is resized, moved to its place and summed, by two products
    with matrices of interpolation weights. C·D·9 multiplications per pixel of h·w instead of H·W.

    Args:
        size: H and W.
        weight: (D, C, 3, 3).
    Returns:
        channels last in memory where the map grows.
    """
    (height, width), (h, w) = size, x.shape[-2:]
    if height * width < 2 * h * w:  # little to save
        return F.conv2d(resize(x, size), weight, bias, padding=1)
    dim = weight.shape[0]
    taps = rskernels.linear(x.permute(0, 2, 3, 1), weight.permute(2, 3, 0, 1).flatten(0, 2), None)
    # (B, h, w, 3·3·D) → (B, 3, h, 3·w, D): what a column of the result needs lies together.
    taps = taps.unflatten(-1, (3, 3, dim)).permute(0, 3, 1, 4, 2, 5).flatten(3, 4)
    rows = _interpolation(w, width, taps) @ taps  # (B, 3, h, W, D)
    out = _interpolation(h, height, taps) @ rows.flatten(1, 2).flatten(2)  # (B, H, W·D)
    out = out.unflatten(2, (width, dim))
    return (out if bias is None else out + bias.to(out.dtype)).permute(0, 3, 1, 2)


def _interpolation(small: int, large: int, like: Tensor) -> Tensor:
    """(large, 3·small): how position y + t − 1 of the resized line is made of the small one, for every y and
    the taps t = 0, 1, 2; zero where that position lies outside."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    unit = torch.eye(small, dtype=dtype, device=like.device).unsqueeze(0)
    line = F.interpolate(unit, size=large, mode="linear", align_corners=False)[0].T
    padded = F.pad(line, (0, 0, 1, 1))
    return torch.cat([padded[tap : tap + large] for tap in range(3)], dim=1).to(like.dtype)
