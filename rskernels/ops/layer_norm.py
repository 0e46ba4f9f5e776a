"""layer_norm: (x - mean) / sqrt(variance + eps) * weight + bias over the last dimension.

Source: Ba et al., arXiv:1607.06450. PyTorch's own is right but for training in bfloat16 on the CPU, where
its backward adds the gradients of weight and bias up in bfloat16; and under autocast it needs copies in
float32. This one reads and writes either dtype, with every sum in float32.

Shapes: N rows (all leading dimensions), D channels. docs/kernels/layer_norm.md has figures.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rskernels.dispatch import choose
from rskernels.library import check_finite, check_tensors, define, differentiate, once_differentiable

_SERVED = (torch.float32, torch.bfloat16)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6, dtype: torch.dtype | None = None
) -> Tensor:
    """Normalise every row of x, then scale and shift its channels.

    Args:
        x: (..., D), any strides.
        weight, bias: (D,).
        eps: added to the variance; at least 0.
        dtype: of the result; None: that of x. The dtype of the product that reads it saves a cast.
    Returns:
        (..., D), contiguous.
    Dtypes: weight and bias may have another floating-point dtype than x and get gradients in their own.
        Autocast changes nothing. float32 and bfloat16 are accelerated on the CPU, all else is served by the
        reference.
    Raises:
        ValueError: shapes that do not fit; eps negative or not finite.
        TypeError: not a floating-point tensor or dtype; eps not a number.
    """
    _check(x, weight, bias, eps, dtype)
    dtype = dtype or x.dtype
    bias = bias.to(weight.dtype)
    unserved = {"cpp": f"a {dtype} result is none of its"} if dtype not in _SERVED else None
    if choose("layer_norm", x, without=unserved) == "reference":
        return layer_norm_reference(x, weight, bias, eps, dtype)
    return _norm_forward(x, weight, bias, eps, dtype)[0]


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """What defines the operator."""
    trains = torch.is_grad_enabled() and (weight.requires_grad or bias.requires_grad)
    if trains and x.dtype in (torch.bfloat16, torch.float16):
        # In float32, as PyTorch's backward of low precision is not to be had (see above).
        return F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps).to(dtype)
    # PyTorch takes float32 weights with low precision, and no other mix.
    low = x.dtype in (torch.bfloat16, torch.float16) and weight.dtype != x.dtype
    wide = torch.float32 if low else x.dtype
    return F.layer_norm(x, weight.shape, weight.to(wide), bias.to(wide), eps).to(dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None) -> None:
    check_tensors("layer_norm", {"x": x, "weight": weight, "bias": bias})
    check_finite("layer_norm", "eps", eps)
    if eps < 0:
        raise ValueError(f"layer_norm: eps is {eps}; expected at least 0")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"layer_norm: dtype is {dtype}; expected a floating-point dtype")
    if weight.dim() != 1 or weight.shape[0] == 0:
        raise ValueError(f"layer_norm: weight has shape {tuple(weight.shape)}; expected (D,)")
    if bias.shape != weight.shape:
        raise ValueError(
            f"layer_norm: bias has shape {tuple(bias.shape)}; expected {tuple(weight.shape)}, that of weight"
        )
    if x.dim() == 0 or x.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"layer_norm: x has shape {tuple(x.shape)}; expected (..., {weight.shape[0]}) for weight "
            f"{tuple(weight.shape)}"
        )


# ---------------------------------------------------------------- registration


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _forward_reference(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.to(_sum_dtype(x)).contiguous()
    mean = wide.mean(-1)
    rstd = (wide.var(-1, unbiased=False) + eps).rsqrt()
    y = (wide - mean[..., None]) * rstd[..., None] * weight.to(wide.dtype) + bias.to(wide.dtype)
    return y.to(dtype), mean, rstd


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[:-1], dtype=_sum_dtype(x))
    return x.new_empty(x.shape, dtype=dtype), mean, torch.empty_like(mean)


def _backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    wide = grad.to(mean.dtype)
    normal = (x.to(mean.dtype) - mean[..., None]) * rstd[..., None]
    dx, dweight, dbias = (x.new_empty(0) for _ in range(3))
    if mask[0]:
        g = wide * weight.to(mean.dtype)
        inner = g - g.mean(-1, keepdim=True) - normal * (g * normal).mean(-1, keepdim=True)
        dx = (inner * rstd[..., None]).to(x.dtype).contiguous()
    if mask[1]:
        dweight = (wide * normal).sum_to_size(weight.shape).to(weight.dtype, copy=True)
    if mask[2]:
        dbias = wide.sum_to_size(weight.shape).to(weight.dtype, copy=True)
    return dx, dweight, dbias


def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = (
        like.new_empty(like.shape) if wanted else x.new_empty(0)
        for like, wanted in zip((x, weight, weight), mask, strict=True)
    )
    return dx, dweight, dbias


# The result, and mean and 1 / sqrt(variance + eps) of every row, which backward reads.
_norm_forward = define(
    "layer_norm_forward(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)",
    reference=_forward_reference,
    fake=_forward_fake,
)
_norm_backward = define(
    "layer_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool[3] mask)"
    " -> (Tensor, Tensor, Tensor)",
    reference=_backward_reference,
    fake=_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight = inputs[:2]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, *output[1:])


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    mask = list(ctx.needs_input_grad[:3])
    gradients = _norm_backward(grad, *ctx.saved_tensors, mask)
    return (*(g if wanted else None for g, wanted in zip(gradients, mask, strict=True)), None, None)


differentiate("layer_norm_forward", _backward, _setup_context)
once_differentiable("layer_norm_backward")
