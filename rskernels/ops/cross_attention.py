"""cross_attention: queries of one set attend to keys of another (SAM's decoder, Mask2Former, Rein, injector).

    out_i = sum_j softmax_j(scale q_i·k_j + log mask_ij) v_j

Shapes: B batch, h heads, Q queries, M keys, d head dim.

docs/kernels/cross_attention.md explains the kernels (csrc/cpu/cross_attention*.cpp for the CPU,
rskernels/triton/cross_attention*.py for GPUs) and has figures.
"""

import math
from typing import Any

import torch
from torch import Tensor

from rskernels import sdpa, xformers
from rskernels.dispatch import choose
from rskernels.library import (
    cast_to_compute_dtype,
    check_finite,
    check_tensors,
    define,
    differentiate,
    once_differentiable,
)


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    drop_first_key_value: bool = False,
) -> Tensor:
    """softmax(scale·q kᵀ + log mask) v, per head.

    Args:
        q: (B, h, Q, d). Any strides, here and below: read in place where d is contiguous, as in the view
            `x.unflatten(-1, (h, d)).transpose(1, 2)` of a (B, Q, h·d) projection.
        k, v: (B, h, M, d), or (1, h, M, d) shared by the whole batch (gradients are summed over it).
        mask: (B, Q, M) bool, shared by the heads, True = attend (as SDPA). A row that attends nowhere
            attends everywhere (Mask2Former's rule; it keeps the softmax finite).
        scale: factor of the logits, 1/sqrt(d) by default.
        drop_first_key_value: the first key counts in the softmax and contributes nothing to the output
            (Rein's "nothing" token): the other weights are not renormalised.
    Returns:
        (B, h, Q, d) in the dtype of q; under autocast in autocast's dtype (float64 stays). An accelerated
        backend stores it as (B, Q, h, d): `out.transpose(1, 2).flatten(2)` copies nothing.
    Dtypes: q decides, under autocast autocast's dtype; k and v are cast to it. Logits and sums are fp32.
        float32 and bfloat16 are accelerated on the CPU, with float16 on CUDA devices where backend("triton")
        asks for it; all else is served by the reference.
    Memory: O(Q + M), forward and backward, on an accelerated backend; a mask is also kept as bits.
    Raises:
        ValueError: shapes that do not fit, no keys. TypeError: mask not bool; q, k or v no floating-point
            tensor.
    """
    _check(q, k, v, mask, scale)
    q, k, v = cast_to_compute_dtype(q, q, k, v)
    backend = choose("cross_attention", q, k, v, without=xformers.ruled_out(q, q.shape[-1]))
    if backend == "reference":
        return cross_attention_reference(q, k, v, mask, scale, drop_first_key_value)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if backend in ("sdpa", "xformers"):
        if mask is not None:
            mask = (mask | ~mask.any(-1, keepdim=True))[:, None]
        attention = sdpa.attention if backend == "sdpa" else xformers.attention
        return attention(q, k, _kept_values(v, drop_first_key_value), mask, scale)
    return _attention_forward(q, k, v, mask, scale, drop_first_key_value)[0]


def cross_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, drop_first_key_value: bool
) -> Tensor:
    """What defines the operator; q, k, v in one dtype."""
    # Not F.scaled_dot_product_attention: on the CPU it returns zeros for a query that holds NaN. The logits
    # are float32 at least, as they are inside a fused kernel.
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast("cpu" if q.is_meta else q.device.type, enabled=False):
        logits = (q.to(dtype) * scale) @ k.to(dtype).transpose(-2, -1)
        if mask is not None:
            logits = logits.masked_fill((~mask & mask.any(-1, keepdim=True))[:, None], -torch.inf)
        weights = logits.softmax(-1)
        if drop_first_key_value:
            weights, v = weights[..., 1:], v[:, :, 1:]
        return (weights @ v.to(dtype)).to(q.dtype)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> None:
    check_tensors("cross_attention", {"q": q, "k": k, "v": v})
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(
                f"cross_attention: {name} has shape {tuple(tensor.shape)}; expected 4 dimensions"
            )
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    if keys == 0 or dim == 0:
        raise ValueError(
            f"cross_attention: k has shape {tuple(k.shape)}; expected at least one key and one channel"
        )
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape[0] not in (1, batch) or tuple(tensor.shape[1:]) != (heads, keys, dim):
            raise ValueError(
                f"cross_attention: {name} has shape {tuple(tensor.shape)}; "
                f"expected ({batch} or 1, {heads}, {keys}, {dim}) for q {tuple(q.shape)}"
            )
    if scale is not None:
        check_finite("cross_attention", "scale", scale, "a finite number or None")
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"cross_attention: mask is {found}; expected torch.bool, True = attend")
    if tuple(mask.shape) != (batch, queries, keys):
        raise ValueError(
            f"cross_attention: mask has shape {tuple(mask.shape)}; expected ({batch}, {queries}, {keys})"
        )
    if mask.device != q.device:
        raise ValueError(f"cross_attention: mask is on {mask.device}, q on {q.device}")


# ---------------------------------------------------------------- registration


def _sum_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(B, h, Q, M), -inf where a query does not attend."""
    scores = scale * (q @ k.transpose(-2, -1))
    if mask is None:
        return scores
    return scores.masked_fill((~mask & mask.any(-1, keepdim=True))[:, None], -torch.inf)


def _saved(scores: Tensor) -> Tensor:
    """What backward rebuilds the weights from: the log-sum-exp (B, h, Q); on CUDA its two parts (B, h, Q, 2):
    the greatest logit over log 2, and the reciprocal of the sum of exponentials relative to it."""
    if not scores.is_cuda:
        return scores.logsumexp(-1)
    top = scores.amax(-1)
    return torch.stack((top / math.log(2), (top - scores.logsumexp(-1)).exp()), -1)


def _kept_values(v: Tensor, drop_first_key_value: bool) -> Tensor:
    """v with a first value of zero where it is dropped."""
    if not drop_first_key_value:
        return v
    return torch.cat([torch.zeros_like(v[:, :, :1]), v[:, :, 1:]], dim=2)


def _token_major(x_bhnd: Tensor) -> Tensor:
    """The same values, in memory as (B, N, h, d)."""
    return x_bhnd.transpose(1, 2).contiguous().transpose(1, 2)


def _forward_composite(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, drop_first_key_value: bool
) -> tuple[Tensor, Tensor]:
    dtype = _sum_dtype(q)
    scores = _scores(q.to(dtype), k.to(dtype), mask, scale)
    out = scores.softmax(-1) @ _kept_values(v.to(dtype), drop_first_key_value)
    return _token_major(out.to(q.dtype)), _saved(scores)


def _backward_composite(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
    drop_first_key_value: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _sum_dtype(q)
    q_, k_, grad_ = q.to(dtype), k.to(dtype), grad.to(dtype)
    v_ = _kept_values(v.to(dtype), drop_first_key_value)
    p = _scores(q_, k_, mask, scale).softmax(-1)
    dp = grad_ @ v_.transpose(-2, -1)
    ds = scale * p * (dp - (p * dp).sum(-1, keepdim=True))
    dv = _kept_values(p.transpose(-2, -1) @ grad_, drop_first_key_value)
    gradients = (ds @ k_, ds.transpose(-2, -1) @ q_, dv)
    dq, dk, dv = (
        _token_major(g.sum_to_size(t.shape).to(t.dtype)) if asked else grad.new_empty(0, 0, 0, 0)
        for g, t, asked in zip(gradients, (q, k, v), wanted, strict=True)
    )
    return dq, dk, dv


def _empty_token_major(like: Tensor) -> Tensor:
    B, h, N, d = like.shape
    return like.new_empty(B, N, h, d).transpose(1, 2)


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, drop_first_key_value: bool
) -> tuple[Tensor, Tensor]:
    saved = (*q.shape[:3], 2) if q.is_cuda else q.shape[:3]
    return _empty_token_major(q), q.new_empty(saved, dtype=_sum_dtype(q))


def _backward_fake(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
    drop_first_key_value: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (
        _empty_token_major(t) if asked else grad.new_empty(0, 0, 0, 0)
        for t, asked in zip((q, k, v), wanted, strict=True)
    )
    return dq, dk, dv


_OPTIONS = "Tensor? mask, float scale, bool drop_first_key_value"

# The output, and `_saved` of the logits.
_attention_forward = define(
    f"cross_attention_forward(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    reference=_forward_composite,
    fake=_forward_fake,
    triton="cross_attention.forward",
)
_attention_backward = define(
    "cross_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_OPTIONS}, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    reference=_backward_composite,
    fake=_backward_fake,
    triton="cross_attention.backward",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, ctx.scale, ctx.drop_first_key_value = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, mask)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    wanted = list(ctx.needs_input_grad[:3])
    gradients = _attention_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.drop_first_key_value, wanted)
    return (*(g if asked else None for g, asked in zip(gradients, wanted, strict=True)), None, None, None)


differentiate("cross_attention_forward", _backward, _setup_context)
once_differentiable("cross_attention_backward")
