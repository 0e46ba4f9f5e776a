"""lora_linear and lora_qkv: a frozen projection plus its low-rank update (Hu et al., arXiv 2106.09685).

Shapes: N rows (all leading dimensions), I input and O output features, r rank, D = O / 3 for a fused qkv.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rskernels.dispatch import choose
from rskernels.library import (
    cast_to_compute_dtype,
    check_finite,
    check_tensors,
    define,
    differentiate,
    once_differentiable,
)


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, *, scale: float
) -> Tensor:
    """x Wᵀ + bias + scale·(x Aᵀ) Bᵀ with W and bias frozen.

    Args:
        x: (..., I), any strides.
        weight: (O, I), frozen. bias: (O,) or None, frozen.
        a: (r, I). b: (O, r).
        scale: alpha / r.
    Returns:
        (..., O). With b = 0 it equals `linear`'s result to the last bit.
    Dtypes: `weight` decides, under autocast autocast's dtype (float64 stays); x, bias, a and b may have
        another floating-point dtype, are cast to it, and get gradients in their own. x Aᵀ and all sums are
        float32 at least. float32 and bfloat16 are accelerated on the CPU, these and float16 on CUDA (backend
        "triton"); all else is served by the reference.
    Memory: backward keeps x, the factors and x Aᵀ, N·r numbers in float32, the last one only where b requires
        grad; nothing of size N·O. In float32 with many rows the forward pass makes a merged weight of O·I
        numbers for the length of the call.
    Raises:
        ValueError: shapes that do not fit; weight or bias requires grad; scale not finite.
        TypeError: not a floating-point tensor; scale not a number.
    """
    _check("lora_linear", x, weight, bias, {"a": a, "b": b}, scale, parts=1)
    x, weight, bias, a, b = cast_to_compute_dtype(weight, x, weight, bias, a, b)
    if choose("lora_linear", x, weight, bias, a, b) == "reference":
        return lora_linear_reference(x, weight, bias, a, b, scale)
    return _lora_forward(x, weight, bias, [a], [b], [0], scale, _needs_xa(b))[0]


def lora_qkv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a_q: Tensor,
    b_q: Tensor,
    a_v: Tensor,
    b_v: Tensor,
    *,
    scale: float,
) -> Tensor:
    """A fused qkv projection, x Wᵀ + bias, whose q and v thirds get a low-rank update of their own.

    Args:
        x: (..., I). weight: (3·D, I), rows in the order q, k, v. bias: (3·D,) or None.
        a_q, a_v: (r, I). b_q, b_v: (D, r).
        scale: alpha / r.
    Returns:
        (..., 3·D). With b_q = b_v = 0 it equals `linear`'s result to the last bit.
    Dtypes, memory (x Aᵀ of both ranks) and errors: as in `lora_linear`.
    """
    _check("lora_qkv", x, weight, bias, {"a_q": a_q, "b_q": b_q, "a_v": a_v, "b_v": b_v}, scale, parts=3)
    x, weight, bias, a_q, b_q, a_v, b_v = cast_to_compute_dtype(weight, x, weight, bias, a_q, b_q, a_v, b_v)
    if choose("lora_qkv", x, weight, bias, a_q, b_q, a_v, b_v) == "reference":
        return lora_qkv_reference(x, weight, bias, a_q, b_q, a_v, b_v, scale)
    first_v = 2 * (weight.shape[0] // 3)
    needs_xa = _needs_xa(b_q, b_v)
    return _lora_forward(x, weight, bias, [a_q, a_v], [b_q, b_v], [0, first_v], scale, needs_xa)[0]


def lora_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """What defines lora_linear; arguments in one dtype."""
    return F.linear(x, weight, bias) + scale * F.linear(F.linear(x, a), b)


def lora_qkv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a_q: Tensor,
    b_q: Tensor,
    a_v: Tensor,
    b_v: Tensor,
    scale: float,
) -> Tensor:
    """What defines lora_qkv; arguments in one dtype."""
    q, k, v = F.linear(x, weight, bias).chunk(3, dim=-1)
    q = q + scale * F.linear(F.linear(x, a_q), b_q)
    v = v + scale * F.linear(F.linear(x, a_v), b_v)
    return torch.cat([q, k, v], dim=-1)


def _needs_xa(*b: Tensor) -> bool:
    """Nobody reads x Aᵀ but the gradients of B."""
    return torch.is_grad_enabled() and any(b_i.requires_grad for b_i in b)


def _check(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: dict[str, Tensor],
    scale: float,
    *,
    parts: int,
) -> None:
    check_tensors(op, {"weight": weight, "x": x, "bias": bias, **factors}, optional=("bias",))
    check_finite(op, "scale", scale)
    if weight.dim() != 2 or weight.shape[0] % parts:
        expected = "(O, I)" if parts == 1 else f"({parts}·D, I)"
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}; expected {expected}")
    outputs, inputs = weight.shape
    if x.dim() == 0 or x.shape[-1] != inputs:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; expected (..., {inputs})")
    if bias is not None and tuple(bias.shape) != (outputs,):
        raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}; expected ({outputs},)")
    names = list(factors)
    for a_name, b_name in zip(names[::2], names[1::2], strict=True):
        a, b = factors[a_name], factors[b_name]
        if a.dim() != 2 or a.shape[1] != inputs or a.shape[0] == 0:
            raise ValueError(f"{op}: {a_name} has shape {tuple(a.shape)}; expected (rank, {inputs})")
        if tuple(b.shape) != (outputs // parts, a.shape[0]):
            raise ValueError(
                f"{op}: {b_name} has shape {tuple(b.shape)}; expected ({outputs // parts}, {a.shape[0]})"
            )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{op}: {name} requires grad; freeze it with requires_grad_(False)")


# ---------------------------------------------------------------- registration
# One private operator serves both: `a` and `b` list the matrices of the updates, and `first_columns` the
# output column at which each update starts. The large product is rskernels::linear_forward, so it is
# whatever serves `linear`. It also returns x Aᵀ (..., sum of ranks) for the gradients of B, in float32 for
# half precision, or an empty tensor without keep_xa. docs/kernels/lora.md has the formulas.


def _xa_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: list[Tensor],
    b: list[Tensor],
    first_columns: list[int],
    scale: float,
    keep_xa: bool,
) -> tuple[Tensor, Tensor]:
    out = torch.ops.rskernels.linear_forward(x, weight, bias, "none", False)[0]
    products = [F.linear(x, a_i) for a_i in a]
    for xa, b_i, column in zip(products, b, first_columns, strict=True):
        out.narrow(-1, column, b_i.shape[0]).add_(F.linear(xa, b_i), alpha=scale)
    xa_dtype = _xa_dtype(x.dtype)
    return out, torch.cat(products, -1).to(xa_dtype) if keep_xa else x.new_empty(0, dtype=xa_dtype)


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: list[Tensor],
    b: list[Tensor],
    first_columns: list[int],
    scale: float,
    keep_xa: bool,
) -> tuple[Tensor, Tensor]:
    rows = x.shape[:-1]
    xa_shape = (*rows, sum(a_i.shape[0] for a_i in a)) if keep_xa else (0,)
    return x.new_empty((*rows, weight.shape[0])), x.new_empty(xa_shape, dtype=_xa_dtype(x.dtype))


def _backward_products(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    xa: Tensor,
    first_columns: list[int],
    scale: float,
    mask: list[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """dx = dy W + g A, dA = gᵀ x, dB = scale·dyᵀ (x Aᵀ), where g = scale·dy B."""
    dx = (grad @ weight).contiguous() if mask[0] else grad.new_empty(0)
    x_rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    da, db = [], []
    first = 0
    for a_i, b_i, column in zip(a, b, first_columns, strict=True):
        part = grad_rows.narrow(-1, column, b_i.shape[0])
        g = scale * part @ b_i
        if mask[0]:
            dx.add_((g @ a_i).view(dx.shape))
        da.append(g.T @ x_rows if mask[1] else grad.new_empty(0))
        if mask[2]:
            xa_rows = xa.reshape(-1, xa.shape[-1]).narrow(-1, first, b_i.shape[1])
            db.append((scale * part.T @ xa_rows.to(part.dtype)).contiguous())
        else:
            db.append(grad.new_empty(0))
        first += b_i.shape[1]
    return dx, da, db


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    xa: Tensor,
    first_columns: list[int],
    scale: float,
    mask: list[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    def like(tensor: Tensor, wanted: bool) -> Tensor:
        return grad.new_empty(tensor.shape if wanted else (0,))

    return like(x, mask[0]), [like(a_i, mask[1]) for a_i in a], [like(b_i, mask[2]) for b_i in b]


_lora_forward = define(
    "lora_forward(Tensor x, Tensor weight, Tensor? bias, Tensor[] a, Tensor[] b, int[] first_columns,"
    " float scale, bool keep_xa) -> (Tensor, Tensor)",
    reference=_forward,
    fake=_forward_fake,
    triton="lora.forward",
)
_lora_backward = define(
    "lora_backward(Tensor grad, Tensor x, Tensor weight, Tensor[] a, Tensor[] b, Tensor xa,"
    " int[] first_columns, float scale, bool[3] mask) -> (Tensor, Tensor[], Tensor[])",
    reference=_backward_products,
    fake=_backward_fake,
    triton="lora.backward",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, a, b, first_columns, scale, keep_xa = inputs
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("lora_forward: weight and bias are frozen, but one requires grad")
    ctx.set_materialize_grads(False)
    ctx.first_columns, ctx.scale, ctx.parts = first_columns, scale, len(b)
    ctx.mask = [x.requires_grad, any(t.requires_grad for t in a), any(t.requires_grad for t in b)]
    if ctx.mask[2] and not keep_xa:
        raise ValueError("lora_forward: keep_xa=False drops the x Aᵀ that the gradients of b need")
    ctx.save_for_backward(x, weight, output[1], *a, *b)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    nothing = [None] * ctx.parts
    if grad is None:
        return None, None, None, nothing, nothing, None, None, None
    x, weight, xa, *factors = ctx.saved_tensors
    a, b = factors[: ctx.parts], factors[ctx.parts :]
    dx, da, db = _lora_backward(grad, x, weight, a, b, xa, ctx.first_columns, ctx.scale, ctx.mask)
    wants_x, wants_a, wants_b = ctx.mask
    return (
        dx if wants_x else None,
        None,
        None,
        list(da) if wants_a else nothing,
        list(db) if wants_b else nothing,
        None,
        None,
        None,
    )


differentiate("lora_forward", _backward, _setup_context)
once_differentiable("lora_backward")
