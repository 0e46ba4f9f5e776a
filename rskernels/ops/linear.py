"""linear: a projection with its bias and activation, through the fastest product this machine has.

PyTorch's own fp32 `F.linear` goes to MKL, which on some processors leaves more than half of the machine
unused; oneDNN's product, which PyTorch also ships, does not. Which of the two serves a shape is stored
data (rskernels/tuning.py), never a timing taken during a run. docs/kernels/linear.md has the figures.

Shapes: N rows (all leading dimensions), I input features, O output features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rskernels import tuning
from rskernels.dispatch import choose, falls_back
from rskernels.library import (
    cast_to_compute_dtype,
    check_tensors,
    define,
    differentiate,
    once_differentiable,
)

ACTIVATIONS = (None, "gelu", "gelu_tanh", "relu")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """activation(x @ weight.T + bias).

    Args:
        x: (..., I), any strides.
        weight: (O, I).
        bias: (O,) or None.
        activation: None, "gelu" (erf), "gelu_tanh" or "relu".
    Returns:
        (..., O), contiguous, in the dtype of `weight`; under autocast in autocast's dtype.
    Dtypes: x and bias are cast to the dtype of the result (under FSDP2's mixed precision the weight has the
        compute dtype). float32 and bfloat16 are accelerated on the CPU; the reference serves everything else.
    Raises:
        ValueError: shapes that do not fit or an unknown activation. TypeError: not a floating-point tensor.
    """
    _check(x, weight, bias, activation)
    x, weight, bias = cast_to_compute_dtype(weight, x, weight, bias)
    if _too_small_to_gain(x, weight) or choose("linear", x, weight, bias) == "reference":
        return linear_reference(x, weight, bias, activation)
    # Without a backward pass nobody reads the pre-activation, so it need not exist.
    training = torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    return _linear_forward(x, weight, bias, activation or "none", training)[0]


def linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """What defines the operator; arguments in one dtype."""
    return _activate(F.linear(x, weight, bias), activation or "none")


def _too_small_to_gain(x: Tensor, weight: Tensor) -> bool:
    """Eager calls of few multiply-adds: calling a registered operator costs more than its product saves. The
    extension would use the same product: the bits are the same. Compiled code has no such overhead, and must
    not be specialised to sizes."""
    return (
        not torch.compiler.is_compiling()
        and falls_back()
        and x.numel() * weight.shape[0] < tuning.SMALL_WORK
        and tuning.serves_small(str(x.dtype).removeprefix("torch.")) == "aten"
    )


def _activate(pre: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return F.gelu(pre)
    if activation == "gelu_tanh":
        return F.gelu(pre, approximate="tanh")
    return F.relu(pre) if activation == "relu" else pre


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    check_tensors("linear", {"weight": weight, "x": x, "bias": bias}, optional=("bias",))
    if weight.dim() != 2:
        raise ValueError(f"linear: weight has shape {tuple(weight.shape)}; expected (O, I)")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear: x has shape {tuple(x.shape)}; expected (..., {weight.shape[1]}) "
            f"for weight {tuple(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"linear: bias has shape {tuple(bias.shape)}; expected ({weight.shape[0]},)")
    if activation not in ACTIVATIONS:
        raise ValueError(f"linear: activation is {activation!r}; expected one of {ACTIVATIONS}")


# ---------------------------------------------------------------- registration


def _forward_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, keep_pre: bool
) -> tuple[Tensor, Tensor]:
    pre = F.linear(x, weight, bias).contiguous()
    if activation == "none":
        return pre, pre.new_empty(0)
    out = _activate(pre, activation).contiguous()
    return out, pre if keep_pre and activation != "relu" else pre.new_empty(0)


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, keep_pre: bool
) -> tuple[Tensor, Tensor]:
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    kept = keep_pre and activation in ("gelu", "gelu_tanh")
    return out, torch.empty_like(out) if kept else x.new_empty(0)


def _backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor, saved: Tensor, activation: str, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    if activation == "gelu":
        grad = torch.ops.aten.gelu_backward(grad, saved)
    elif activation == "gelu_tanh":
        grad = torch.ops.aten.gelu_backward(grad, saved, approximate="tanh")
    elif activation == "relu":
        grad = torch.ops.aten.threshold_backward(grad, saved, 0)
    rows = grad.reshape(-1, grad.shape[-1])
    dx = (rows @ weight).reshape(*grad.shape[:-1], weight.shape[1]) if mask[0] else grad.new_empty(0)
    dw = (rows.T @ x.reshape(-1, x.shape[-1])).contiguous() if mask[1] else grad.new_empty(0)
    db = rows.sum(0) if mask[2] else grad.new_empty(0)
    return dx.contiguous(), dw, db


def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, saved: Tensor, activation: str, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    def shaped(wanted: bool, *shape: Any) -> Tensor:
        return grad.new_empty(shape if wanted else (0,))

    in_features, out_features = weight.shape[1], weight.shape[0]
    return (
        shaped(mask[0], *grad.shape[:-1], in_features),
        shaped(mask[1], out_features, in_features),
        shaped(mask[2], out_features),
    )


# `saved` is the pre-activation for gelu, the output for relu, empty without an activation.
_linear_forward = define(
    "linear_forward(Tensor x, Tensor weight, Tensor? bias, str activation, bool keep_pre)"
    " -> (Tensor, Tensor)",
    reference=_forward_reference,
    fake=_forward_fake,
)
_linear_backward = define(
    "linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor saved, str activation, bool[3] mask)"
    " -> (Tensor, Tensor, Tensor)",
    reference=_backward_reference,
    fake=_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, activation, keep_pre = inputs
    out, pre = output
    if activation in ("gelu", "gelu_tanh") and not keep_pre:
        raise ValueError("linear_forward: keep_pre=False drops the pre-activation that backward needs")
    ctx.set_materialize_grads(False)
    ctx.activation = activation
    # x is kept for the weight's gradient only, the weight for x's only.
    ctx.x_shape, ctx.weight_shape = x.shape, weight.shape
    ctx.save_for_backward(
        x if ctx.needs_input_grad[1] else None,
        weight if ctx.needs_input_grad[0] else None,
        out if activation == "relu" else pre,
    )


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None
    x, weight, saved = ctx.saved_tensors
    mask = list(ctx.needs_input_grad[:3])
    # An operand that the wanted gradients do not read is passed as shape only.
    x = grad.new_empty(1).expand(ctx.x_shape) if x is None else x
    weight = grad.new_empty(1).expand(ctx.weight_shape) if weight is None else weight
    gradients = _linear_backward(grad, x, weight, saved, ctx.activation, mask)
    dx, dw, db = (g if wanted else None for g, wanted in zip(gradients, mask, strict=True))
    return dx, dw, db, None, None


differentiate("linear_forward", _backward, _setup_context)
once_differentiable("linear_backward")
