"""deformable_attention: multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, eq. (3)).

Shapes: B batch, h heads, d head dim, L levels, S = sum of the levels' pixels, Q queries, P points per level.

docs/kernels/deformable_attention.md explains the kernels (csrc/cpu, rskernels/triton) and has figures.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rskernels.dispatch import choose
from rskernels.library import INTS, check_tensors, define, differentiate, once_differentiable


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
        A location that is no finite number makes its query's head NaN and nothing else.
    Dtypes: each argument may have its own; float32 and bfloat16 value is accelerated on the CPU, these and
        float16 by Triton on CUDA (when asked for by name), unless locations or weights are float64. The
        reference serves everything else.
    Raises:
        ValueError: shapes that do not fit. TypeError: not a floating-point tensor; spatial_shapes a tensor.
    """
    _check(value, spatial_shapes, sampling_locations, attention_weights)
    # The kernel computes in float32 whatever the dtypes; only float64 asks for more.
    wider = (t for t in (sampling_locations, attention_weights) if t.dtype == torch.float64)
    if choose("deformable_attention", value, *wider) == "reference":
        return deformable_attention_reference(value, spatial_shapes, sampling_locations, attention_weights)
    sides = [side for shape in spatial_shapes for side in shape]
    return _attention_forward(value, sides, sampling_locations, attention_weights)


def deformable_attention_reference(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """What defines the operator: one grid_sample per level."""
    batch, _, heads, dim = value.shape
    queries = sampling_locations.shape[1]
    maps, grids, weights = _as_images(value, sampling_locations, attention_weights)
    out = maps.new_zeros(batch * heads, dim, queries)
    for level, image in enumerate(_levels(maps, spatial_shapes)):
        sampled = F.grid_sample(image, grids[:, :, level], "bilinear", "zeros", align_corners=False)
        out = out + (sampled * weights[:, None, :, level]).sum(-1)
    return out.view(batch, heads * dim, queries).transpose(1, 2).to(value.dtype).contiguous()


def _as_images(
    value: Tensor, sampling_locations: Tensor, attention_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What grid_sample wants, in the dtype of the arithmetic: value as (B·h, d, S), locations in [-1, 1] as
    (B·h, Q, L, P, 2), and weights as (B·h, Q, L, P)."""
    dtype = torch.promote_types(value.dtype, sampling_locations.dtype)
    dtype = torch.promote_types(torch.promote_types(dtype, attention_weights.dtype), torch.float32)
    batch, pixels, heads, dim = value.shape
    maps = value.to(dtype).permute(0, 2, 3, 1).reshape(batch * heads, dim, pixels)
    grids = (2 * sampling_locations.to(dtype) - 1).transpose(1, 2).flatten(0, 1)
    weights = attention_weights.to(dtype).transpose(1, 2).flatten(0, 1)
    return maps, grids, weights


def _levels(maps: Tensor, spatial_shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """(B·h, d, S) as one (B·h, d, height, width) per level."""
    sizes = [height * width for height, width in spatial_shapes]
    levels = maps.split(sizes, dim=2)
    return [level.unflatten(2, shape) for level, shape in zip(levels, spatial_shapes, strict=True)]


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
    tensors = {
        "value": value,
        "sampling_locations": sampling_locations,
        "attention_weights": attention_weights,
    }
    check_tensors("deformable_attention", tensors)
    if value.dim() != 4:
        raise ValueError(f"deformable_attention: value has shape {tuple(value.shape)}; expected (B, S, h, d)")
    if not isinstance(spatial_shapes, Sequence) or not all(
        isinstance(shape, Sequence) and len(shape) == 2 and all(isinstance(side, INTS) for side in shape)
        for shape in spatial_shapes
    ):
        raise TypeError(
            f"deformable_attention: spatial_shapes is {spatial_shapes!r}; expected a list of (height, width) "
            "ints, one of each level"
        )
    if len(spatial_shapes) == 0:
        raise ValueError(
            "deformable_attention: spatial_shapes is empty; expected (height, width) of each level"
        )
    if any(height < 1 or width < 1 for height, width in spatial_shapes):
        raise ValueError(
            f"deformable_attention: spatial_shapes is {list(spatial_shapes)}; expected sides of at least 1"
        )
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


# ---------------------------------------------------------------- registration


def _pairs(sides: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(sides[::2], sides[1::2], strict=True))


def _forward_composite(
    value: Tensor, sides: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    return deformable_attention_reference(value, _pairs(sides), sampling_locations, attention_weights)


def _backward_composite(
    grad: Tensor,
    value: Tensor,
    sides: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, heads, _ = value.shape
    maps, grids, weights = _as_images(value, sampling_locations, attention_weights)
    grad_out = grad.to(maps.dtype).transpose(1, 2).unflatten(1, (heads, -1)).flatten(0, 1)[..., None]
    grad_maps, grad_grids, grad_weights = [], [], []
    for level, image in enumerate(_levels(maps, _pairs(sides))):
        grid = grids[:, :, level]
        sampled = F.grid_sample(image, grid, "bilinear", "zeros", align_corners=False)
        grad_weights.append((grad_out * sampled).sum(1))
        grad_sampled = grad_out * weights[:, None, :, level]
        grad_image, grad_grid = torch.ops.aten.grid_sampler_2d_backward(
            grad_sampled, image, grid, 0, 0, False, [True, True]
        )
        grad_maps.append(grad_image.flatten(2))
        grad_grids.append(2 * grad_grid)

    def shaped(wanted: bool, like: Tensor, make: Callable[[], Tensor]) -> Tensor:
        return make().to(like.dtype).contiguous() if wanted else grad.new_empty(0)

    def by_query(parts: list[Tensor]) -> Tensor:  # (B·h, Q, P, ...) of each level -> (B, Q, h, L, P, ...)
        return torch.stack(parts, 2).unflatten(0, (batch, heads)).transpose(1, 2)

    return (
        shaped(
            mask[0], value, lambda: torch.cat(grad_maps, 2).unflatten(0, (batch, heads)).permute(0, 3, 1, 2)
        ),
        shaped(mask[1], sampling_locations, lambda: by_query(grad_grids)),
        shaped(mask[2], attention_weights, lambda: by_query(grad_weights)),
    )


def _forward_fake(
    value: Tensor, sides: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    return value.new_empty(value.shape[0], sampling_locations.shape[1], value.shape[2] * value.shape[3])


def _backward_fake(
    grad: Tensor,
    value: Tensor,
    sides: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    def shaped(wanted: bool, like: Tensor) -> Tensor:
        return like.new_empty(like.shape) if wanted else grad.new_empty(0)

    return (
        shaped(mask[0], value),
        shaped(mask[1], sampling_locations),
        shaped(mask[2], attention_weights),
    )


# spatial_shapes as (height, width, height, width, ...): schemas have no list of pairs.
_attention_forward = define(
    "deformable_attention_forward(Tensor value, SymInt[] sides, Tensor sampling_locations,"
    " Tensor attention_weights) -> Tensor",
    reference=_forward_composite,
    fake=_forward_fake,
    triton="deformable_attention.forward",
)
_attention_backward = define(
    "deformable_attention_backward(Tensor grad, Tensor value, SymInt[] sides, Tensor sampling_locations,"
    " Tensor attention_weights, bool[3] mask) -> (Tensor, Tensor, Tensor)",
    reference=_backward_composite,
    fake=_backward_fake,
    triton="deformable_attention.backward",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.sides, sampling_locations, attention_weights = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(value, sampling_locations, attention_weights)


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    value, sampling_locations, attention_weights = ctx.saved_tensors
    needed = ctx.needs_input_grad
    mask = [needed[0], needed[2], needed[3]]
    gradients = _attention_backward(grad, value, ctx.sides, sampling_locations, attention_weights, mask)
    grad_value, grad_locations, grad_weights = (
        g if wanted else None for g, wanted in zip(gradients, mask, strict=True)
    )
    return grad_value, None, grad_locations, grad_weights


differentiate("deformable_attention_forward", _backward, _setup_context)
once_differentiable("deformable_attention_backward")
