"""deformable_attention: multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, eq. (3)).

Shapes: B batch, h heads, d head dim, L levels, S = sum of the levels' pixels, Q queries, P points per level.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rskernels.dispatch import choose


def deformable_attention(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Sum over levels and points of attention_weights · value sampled bilinearly at sampling_locations.

    Args:
        value: (B, S, h, d), the levels' maps flattened row by row, one after the other.
        spatial_shapes: (height, width) of each level as Python ints (a tensor would synchronise with the
            device and break export).
        sampling_locations: (B, Q, h, L, P, 2) as (x, y); (0, 0) is the upper left corner of the upper left
            pixel, (1, 1) the lower right corner of the last one. Outside, value is zero.
        attention_weights: (B, Q, h, L, P), used as they are.
    Returns:
        (B, Q, h·d) in the dtype of value. The arithmetic is in the widest dtype of the arguments and at
        least float32, also under autocast: locations in half precision would miss their pixel.
    Raises:
        ValueError: shapes that do not fit. TypeError: not floating point.
    """
    _check(value, spatial_shapes, sampling_locations, attention_weights)
    choose("deformable_attention", value, sampling_locations, attention_weights)
    return deformable_attention_reference(value, spatial_shapes, sampling_locations, attention_weights)


def deformable_attention_reference(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """What defines the operator: one grid_sample per level."""
    dtype = torch.promote_types(value.dtype, sampling_locations.dtype)
    dtype = torch.promote_types(torch.promote_types(dtype, attention_weights.dtype), torch.float32)
    batch, _, heads, dim = value.shape
    queries = sampling_locations.shape[1]
    # grid_sample wants (B·h, d, height, width) and locations in [-1, 1] as (B·h, Q, P, 2).
    maps = value.to(dtype).permute(0, 2, 3, 1).reshape(batch * heads, dim, -1)
    grids = (2 * sampling_locations.to(dtype) - 1).transpose(1, 2).flatten(0, 1)
    weights = attention_weights.to(dtype).transpose(1, 2).flatten(0, 1)
    out = maps.new_zeros(batch * heads, dim, queries)
    first = 0
    for level, (height, width) in enumerate(spatial_shapes):
        image = maps[:, :, first : first + height * width].unflatten(2, (height, width))
        sampled = F.grid_sample(image, grids[:, :, level], "bilinear", "zeros", align_corners=False)
        out = out + (sampled * weights[:, None, :, level]).sum(-1)
        first += height * width
    return out.view(batch, heads * dim, queries).transpose(1, 2).to(value.dtype).contiguous()


def _check(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> None:
    if isinstance(spatial_shapes, Tensor):
        raise TypeError(
            "deformable_attention: spatial_shapes is a tensor; expected (height, width) ints, use .tolist()"
        )
    if value.dim() != 4:
        raise ValueError(f"deformable_attention: value has shape {tuple(value.shape)}; expected (B, S, h, d)")
    pixels = sum(height * width for height, width in spatial_shapes)
    if value.shape[1] != pixels:
        raise ValueError(
            f"deformable_attention: value has {value.shape[1]} pixels; expected {pixels} for spatial_shapes "
            f"{list(spatial_shapes)}"
        )
    batch, _, heads, _ = value.shape
    levels = len(spatial_shapes)
    shape = tuple(sampling_locations.shape)
    if len(shape) != 6 or (shape[0], shape[2], shape[3], shape[5]) != (batch, heads, levels, 2):
        raise ValueError(
            f"deformable_attention: sampling_locations has shape {shape}; "
            f"expected ({batch}, Q, {heads}, {levels}, P, 2)"
        )
    if tuple(attention_weights.shape) != shape[:-1]:
        raise ValueError(
            f"deformable_attention: attention_weights has shape {tuple(attention_weights.shape)}; "
            f"expected {shape[:-1]}"
        )
    for name, tensor in (
        ("value", value),
        ("sampling_locations", sampling_locations),
        ("attention_weights", attention_weights),
    ):
        if not tensor.is_floating_point():
            raise TypeError(
                f"deformable_attention: {name} is {tensor.dtype}; expected a floating-point tensor"
            )
        if tensor.device != value.device:
            raise ValueError(f"deformable_attention: {name} is on {tensor.device}, value on {value.device}")
