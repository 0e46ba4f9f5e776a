"""lora_linear and lora_qkv: a frozen projection plus its low-rank update (Hu et al., arXiv 2106.09685).

Shapes: N rows (all leading dimensions), I input and O output features, r rank, D = O / 3 for a fused qkv.
"""

from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rskernels.dispatch import choose
from rskernels.library import cast_to_compute_dtype, define, differentiate, once_differentiable


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, *, scale: float
) -> Tensor:
    """x Wᵀ + bias + scale·(x Aᵀ) Bᵀ with W and bias frozen.

    Args:
        x: (..., I). weight: (O, I). bias: (O,) or None. a: (r, I). b: (O, r).
        scale: alpha / r.
    Returns:
        (..., O) in the dtype of `weight`, under autocast in autocast's dtype (float64 stays); x, a and b are
        cast to it. With b = 0 it equals `linear`'s result to the last bit.
    Raises:
        ValueError: shapes that do not fit; weight or bias requires grad. TypeError: not floating point.
    """
    _check("lora_linear", x, weight, bias, {"a": a, "b": b}, parts=1)
    x, weight, bias, a, b = cast_to_compute_dtype(weight, x, weight, bias, a, b)
    if choose("lora_linear", x, weight, bias, a, b) == "reference":
        return lora_linear_reference(x, weight, bias, a, b, scale)
    return _lora_forward(x, weight, bias, a, [b], [0], scale)[0]


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
        (..., 3·D), dtypes and errors as in `lora_linear`. With b_q = b_v = 0 it equals `linear`'s result to
        the last bit.
    """
    _check("lora_qkv", x, weight, bias, {"a_q": a_q, "b_q": b_q, "a_v": a_v, "b_v": b_v}, parts=3)
    x, weight, bias, a_q, b_q, a_v, b_v = cast_to_compute_dtype(weight, x, weight, bias, a_q, b_q, a_v, b_v)
    if choose("lora_qkv", x, weight, bias, a_q, b_q, a_v, b_v) == "reference":
        return lora_qkv_reference(x, weight, bias, a_q, b_q, a_v, b_v, scale)
    first_v = 2 * (weight.shape[0] // 3)
    return _lora_forward(x, weight, bias, torch.cat([a_q, a_v]), [b_q, b_v], [0, first_v], scale)[0]


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


def _check(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, factors: dict[str, Tensor], *, parts: int
) -> None:
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
    for name, tensor in {"x": x, "weight": weight, "bias": bias, **factors}.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} is {tensor.dtype}; expected a floating-point tensor")
        if tensor.device != weight.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, weight on {weight.device}")
        if name in ("weight", "bias") and tensor.requires_grad:
            raise ValueError(f"{op}: {name} requires grad; freeze it with requires_grad_(False)")


# ---------------------------------------------------------------- registration
# One private operator serves both: `a` stacks the A matrices, `b` lists the B matrices, and `columns` says
# at which output column each B's product is added. The large product is rskernels::linear_forward, so it is
# whatever serves `linear`, and with B = 0 its result stays as it is.


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: list[Tensor],
    columns: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    linear_forward = torch.ops.rskernels.linear_forward
    out = linear_forward(x, weight, bias, "none", False)[0]
    xa = linear_forward(x, a, None, "none", False)[0]
    out_rows, xa_rows = out.reshape(-1, out.shape[-1]), xa.reshape(-1, xa.shape[-1])
    first = 0
    for b_i, column in zip(b, columns, strict=True):
        rank = b_i.shape[1]
        out_rows[:, column : column + b_i.shape[0]].addmm_(
            xa_rows[:, first : first + rank], b_i.T, alpha=scale
        )
        first += rank
    return out, xa


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: list[Tensor],
    columns: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], weight.shape[0])), x.new_empty((*x.shape[:-1], a.shape[0]))


def _backward_products(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: list[Tensor],
    xa: Tensor,
    columns: list[int],
    scale: float,
    mask: list[bool],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """dx = dy W + g A, dA = gᵀ x, dB = scale·dyᵀ (x Aᵀ), where g = scale·dy B.

    The orders of the thin products are measured: dy B as one product with all B matrices in one (O, sum of
    ranks) matrix, zero elsewhere, because the gradient is then read as it lies in memory; dBᵀ, not dB.
    """
    linear_forward, linear_backward = torch.ops.rskernels.linear_forward, torch.ops.rskernels.linear_backward
    empty = grad.new_empty(0)
    dx, da, db = empty, empty.clone(), [grad.new_empty(0) for _ in b]
    grad = grad.contiguous()
    ends = list(accumulate(b_i.shape[1] for b_i in b))
    places = [
        (slice(column, column + b_i.shape[0]), slice(end - b_i.shape[1], end))
        for b_i, column, end in zip(b, columns, ends, strict=True)
    ]
    wide_b = grad.new_zeros(weight.shape[0], a.shape[0])
    for b_i, place in zip(b, places, strict=True):
        wide_b[place] = b_i
    if mask[0] or mask[1]:
        g = linear_forward(grad, wide_b.T.contiguous(), None, "none", False)[0].mul_(scale)
        if mask[0]:
            dx = linear_backward(grad, x, weight, empty, "none", [True, False, False])[0]
            dx.view(-1, dx.shape[-1]).addmm_(g.view(-1, g.shape[-1]), a)
        if mask[1]:
            da = linear_backward(g, x, a, empty, "none", [False, True, False])[1]
    if mask[2]:
        grad_rows, xa_rows = grad.view(-1, grad.shape[-1]), xa.view(-1, xa.shape[-1])
        products = [xa_rows[:, ranks].T @ grad_rows[:, columns] for columns, ranks in places]
        db = [product.T.mul(scale).contiguous() for product in products]
    return dx, da, db


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: list[Tensor],
    xa: Tensor,
    columns: list[int],
    scale: float,
    mask: list[bool],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    def like(tensor: Tensor, wanted: bool) -> Tensor:
        return grad.new_empty(tensor.shape if wanted else (0,))

    return like(x, mask[0]), like(a, mask[1]), [like(b_i, mask[2]) for b_i in b]


_lora_forward = define(
    "lora_forward(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor[] b, int[] columns, float scale)"
    " -> (Tensor, Tensor)",
    reference=_forward,
    fake=_forward_fake,
)
_lora_backward = define(
    "lora_backward(Tensor grad, Tensor x, Tensor weight, Tensor a, Tensor[] b, Tensor xa, int[] columns,"
    " float scale, bool[3] mask) -> (Tensor, Tensor, Tensor[])",
    reference=_backward_products,
    fake=_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, a, b, columns, scale = inputs
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("lora_forward: weight and bias are frozen, but one requires grad")
    ctx.set_materialize_grads(False)
    ctx.columns, ctx.scale, ctx.ranks = columns, scale, len(b)
    ctx.wants_b = any(b_i.requires_grad for b_i in b)
    ctx.save_for_backward(x, weight, a, output[1], *b)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None, None, [None] * ctx.ranks, None, None
    x, weight, a, xa, *b = ctx.saved_tensors
    mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[3], ctx.wants_b]
    dx, da, db = _lora_backward(grad, x, weight, a, b, xa, ctx.columns, ctx.scale, mask)
    return (
        dx if mask[0] else None,
        None,
        None,
        da if mask[1] else None,
        list(db) if mask[2] else [None] * ctx.ranks,
        None,
        None,
    )


differentiate("lora_forward", _backward, _setup_context)
once_differentiable("lora_backward")
