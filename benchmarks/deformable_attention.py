"""Multi-scale deformable attention against its grid_sample formulation, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

import rskernels
from benchmarks.measure import PASSES, Call, Case, batches, call_of, device, dtypes, sized

PYRAMID = ((16, 16), (32, 32), (64, 64))
# name -> (B, levels, Q, heads, d): Mask2Former's pixel decoder at 512 pixels; ViT-Adapter's injector (the
# ViT's 32x32 tokens ask the pyramid) and extractor (the pyramid asks the tokens). Four points per level.
SHAPES = {
    "pixel decoder": (1, PYRAMID, 5376, 8, 32),
    "injector": (1, PYRAMID, 1024, 12, 64),
    "extractor": (1, ((32, 32),), 5376, 6, 64),
}
POINTS = 4
Levels = tuple[tuple[int, int], ...]


def _shape(name: str) -> tuple[int, Levels, int, int, int]:
    B, *rest = SHAPES[name]
    return batches() * B, *rest


def _grid_sample(value: Tensor, shapes: Levels, locations: Tensor, weights: Tensor) -> Tensor:
    """The pure-PyTorch form that public code ships: one grid_sample per level, one sum at the end. In fp32:
    bf16 grids would miss by up to half a pixel of a 64x64 map, and grid_sample is slower in bf16."""
    B, _, h, d = value.shape
    Q, dtype = locations.shape[1], value.dtype
    grids, value = 2 * locations - 1, value.float()
    sampled = []
    for level, image in enumerate(value.split([height * width for height, width in shapes], dim=1)):
        image = image.flatten(2).transpose(1, 2).reshape(B * h, d, *shapes[level])
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        sampled.append(F.grid_sample(image, grid, "bilinear", "zeros", align_corners=False))
    shares = weights.transpose(1, 2).reshape(B * h, 1, Q, -1)
    out = (torch.stack(sampled, dim=-2).flatten(-2) * shares).sum(-1)
    return out.view(B, h * d, Q).transpose(1, 2).to(dtype).contiguous()


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_grid_sample, dynamic=False)


def _reference_points(queries: int) -> Tensor:
    """(Q, 2): the pixel centres that queries belong to, all levels or one map of tokens."""
    levels = PYRAMID if queries == 5376 else ((32, 32),)
    points = []
    for height, width in levels:
        y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width,
                              indexing="ij")  # fmt: skip
        points.append(torch.stack([x.flatten(), y.flatten()], -1))
    return torch.cat(points)


def _build(name: str, dtype: torch.dtype, which: str) -> dict[str, Call]:
    B, shapes, Q, h, d = _shape(name)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    value = random(B, sum(height * width for height, width in shapes), h, d).to(dtype)
    # Around the query's own pixel, some 2 pixels of each level away.
    sizes = torch.tensor([[width, height] for height, width in shapes])[:, None]
    offsets = 2 * random(B, Q, h, len(shapes), POINTS, 2) / sizes
    locations = _reference_points(Q)[None, :, None, None, None] + offsets
    weights = random(B, Q, h, len(shapes) * POINTS).softmax(-1).view(B, Q, h, len(shapes), POINTS)
    inputs = [tensor.to(device()).requires_grad_() for tensor in (value, locations, weights)]
    grad = random(B, Q, h * d).to(device(), dtype)
    forms: dict[str, Callable[..., Tensor]] = {
        "rskernels": rskernels.deformable_attention,
        "eager": _grid_sample,
        "compiled": _compiled(),
    }

    def of(form: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda value, locations, weights: form(value, shapes, locations, weights)

    return {peer: call_of(which, of(form), inputs, grad) for peer, form in forms.items()}


def _flops(name: str) -> float:
    """Multiply and add for four corners and each channel of every sample, forward."""
    B, shapes, Q, h, d = _shape(name)
    return 2.0 * 4 * B * Q * h * len(shapes) * POINTS * d


def _bytes(name: str, dtype: torch.dtype, which: str) -> float:
    """Value and output in `dtype`, locations (two numbers) and weights (one) in fp32."""
    B, shapes, Q, h, d = _shape(name)
    value = B * sum(height * width for height, width in shapes) * h * d * dtype.itemsize
    samples = B * Q * h * len(shapes) * POINTS * 3 * 4
    out = B * Q * h * d * dtype.itemsize
    forward = value + samples + out
    backward = forward + value + samples  # their gradients are written
    return {"forward": forward, "backward": backward, "both": forward + backward}[which]


def cases() -> list[Case]:
    return [
        Case(
            name=f"{which}, {sized(name)}, {str(dtype)[6:]}",
            build=partial(_build, name, dtype, which),
            dtype=dtype,
            # Backward: a product for locations and weights, and one for value.
            flops=_flops(name) * {"forward": 1, "backward": 2, "both": 3}[which],
            bytes=_bytes(name, dtype, which),
        )
        for which in PASSES
        for name in SHAPES
        for dtype in dtypes()
    ]
