"""rel_pos_attention: self-attention over a grid of tokens with SAM's decomposed relative position bias.

    out_i = sum_j softmax_j(scale q_i·k_j + q_i·R_h[y_i - y_j + H - 1] + q_i·R_w[x_i - x_j + W - 1]) v_j

over the whole grid, or inside windows. Source: Li et al., "MViTv2" (arXiv:2112.01526), eq. 4, as used by
Kirillov et al., "Segment Anything" (arXiv:2304.02643): the bias takes q unscaled.

Shapes: B batch, H/W grid rows and columns, D embedding, n heads, d = D / n head dim, h/w window rows and
columns (the grid's own without windows), N = h·w tokens of a window, M number of windows in the batch.

docs/kernels/rel_pos_attention.md explains the kernels (csrc/cpu/rel_pos_attention.cpp,
rskernels/triton/rel_pos_attention*.py) and has figures.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rskernels import sdpa, xformers
from rskernels.dispatch import choose
from rskernels.library import (
    autocast_dtype,
    check_finite,
    check_tensors,
    define,
    differentiate,
    once_differentiable,
)

LARGEST_WINDOW = 4096  # kLargestWindow in csrc/cpu/rel_pos_attention.h


def rel_pos_attention(
    qkv: Tensor,
    rel_pos_h: Tensor | None,
    rel_pos_w: Tensor | None,
    *,
    num_heads: int,
    window_size: int = 0,
    pad_qkv: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of every token to all tokens of its window (of the grid when window_size is 0).

    Args:
        qkv: (B, H, W, 3·D): queries, keys and values one after the other, each with its heads one after the
            other. Any strides; read in place where the channels are neighbours in memory. A plain sequence
            of N tokens is the grid (B, 1, N, 3·D).
        rel_pos_h, rel_pos_w: (2·h - 1, d) and (2·w - 1, d), or both None: no bias.
        num_heads: n; divides D.
        window_size: side of the windows, at most 4096 tokens; 0: the grid is one window. The grid is
            virtually padded at its bottom and right to a multiple.
        pad_qkv: (3·D,), what a padded token's q, k and v are: the bias of the qkv projection. Padded keys and
            values take part in the softmax. None: zeros (a projection without bias). Unused, without
            a gradient, where the windows divide the grid.
        scale: of q·k; None: d ** -0.5.
    Returns:
        (B, H, W, D), contiguous, in the dtype of qkv.
    Dtypes: qkv decides, under autocast autocast's dtype; the other tensors may have another floating-point
        dtype, are rounded to that of qkv where they meet it, and get gradients in their own. Sums are fp32.
        float32 and bfloat16 are accelerated on the CPU, float32, float16 and bfloat16 on CUDA (head dims up
        to 256, in float32 to 64; on request: backend "triton"), all else is served by the reference.
    Memory: O(N), forward and backward, on an accelerated backend; on CUDA, with tables, O(N·(h + w)).
    Raises:
        ValueError: shapes or numbers that do not fit. TypeError: not a floating-point tensor; num_heads or
            window_size not an int; scale not a number.
    """
    _check(qkv, rel_pos_h, rel_pos_w, num_heads, window_size, pad_qkv, scale)
    qkv = qkv.to(autocast_dtype(qkv) or qkv.dtype)
    h, w = _window(qkv, window_size)
    if qkv.shape[1] % h == 0 and qkv.shape[2] % w == 0:
        pad_qkv = None  # nothing is padded: no gradient, on any backend
    head_dim = qkv.shape[-1] // (3 * num_heads)
    scale = head_dim**-0.5 if scale is None else float(scale)
    backend = choose("rel_pos_attention", qkv, without=_without(qkv, head_dim))
    if backend == "reference":
        return rel_pos_attention_reference(qkv, rel_pos_h, rel_pos_w, pad_qkv, num_heads, window_size, scale)
    if backend in ("sdpa", "xformers"):
        q, k, v = _heads_of_windows(qkv, pad_qkv, num_heads, window_size)
        bias = _bias(q, rel_pos_h, rel_pos_w, _window(qkv, window_size))
        attention = sdpa.attention if backend == "sdpa" else xformers.attention
        out_MNC = attention(q, k, v, bias, scale).transpose(1, 2).flatten(2)
        return _grid_of_windows(out_MNC, qkv, window_size).contiguous()
    return _attention_forward(qkv, rel_pos_h, rel_pos_w, pad_qkv, num_heads, window_size, scale)[0]


def _without(qkv: Tensor, head_dim: int) -> dict[str, str]:
    """The backends that this head dim rules out, and why; in Triton a query's numbers fit into registers."""
    ruled_out = xformers.ruled_out(qkv, head_dim) or {}
    limit = 64 if qkv.dtype == torch.float32 else 256
    if head_dim > limit:
        kind = str(qkv.dtype).removeprefix("torch.")
        ruled_out["triton"] = f"in {kind} its head dims are at most {limit}, this is {head_dim}"
    return ruled_out


def rel_pos_attention_reference(
    qkv: Tensor,
    rel_pos_h: Tensor | None,
    rel_pos_w: Tensor | None,
    pad_qkv: Tensor | None,
    num_heads: int,
    window_size: int,
    scale: float,
) -> Tensor:
    """What defines the operator."""
    q, k, v = _heads_of_windows(qkv, pad_qkv, num_heads, window_size)
    bias = _bias(q, rel_pos_h, rel_pos_w, _window(qkv, window_size))
    out_MnNd = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    if bias is None:  # SDPA without a bias makes 0 of a query that is NaN
        out_MnNd = out_MnNd.masked_fill(q.isnan().any(-1, keepdim=True), torch.nan)
    return _grid_of_windows(out_MnNd.transpose(1, 2).flatten(2), qkv, window_size).contiguous()


def _window(grid: Tensor, window_size: int) -> tuple[int, int]:
    return (window_size, window_size) if window_size else (grid.shape[1], grid.shape[2])


def _windows(x_BHWC: Tensor, pad_C: Tensor | None, window_size: int) -> Tensor:
    """(M, N, C): the windows of the padded grid, row by row."""
    B, H, W, C = x_BHWC.shape
    h, w = _window(x_BHWC, window_size)
    down, across = -H % h, -W % w
    if down or across:
        pad_C = x_BHWC.new_zeros(C) if pad_C is None else pad_C.to(x_BHWC.dtype)
        x_BHWC = torch.cat([x_BHWC, pad_C.expand(B, H, across, C)], dim=2)
        x_BHWC = torch.cat([x_BHWC, pad_C.expand(B, down, W + across, C)], dim=1)
    x = x_BHWC.reshape(B, (H + down) // h, h, (W + across) // w, w, C)
    return x.transpose(2, 3).reshape(-1, h * w, C)


def _grid_of_windows(x_MNC: Tensor, grid: Tensor, window_size: int) -> Tensor:
    """The inverse of _windows for the grid of `grid`; padding is dropped."""
    B, H, W, _ = grid.shape
    h, w = _window(grid, window_size)
    x = x_MNC.reshape(B, -(-H // h), -(-W // w), h, w, x_MNC.shape[-1])
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :H, :W]


def _heads_of_windows(
    qkv: Tensor, pad_qkv: Tensor | None, num_heads: int, window_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as (M, n, N, d)."""
    x_MNC = _windows(qkv, pad_qkv, window_size)
    q, k, v = x_MNC.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _offsets(side: int, device: torch.device) -> Tensor:
    """(side, side): the table row of query i and key j."""
    position = torch.arange(side, device=device)
    return position[:, None] - position[None, :] + side - 1


def _bias(
    q_MnNd: Tensor, rel_pos_h: Tensor | None, rel_pos_w: Tensor | None, window: tuple[int, int]
) -> Tensor | None:
    """(M, n, N, N), or None without tables."""
    if rel_pos_h is None or rel_pos_w is None:
        return None
    q = q_MnNd.unflatten(2, window)
    r_h = rel_pos_h.to(q.dtype)[_offsets(window[0], q.device)]
    r_w = rel_pos_w.to(q.dtype)[_offsets(window[1], q.device)]
    # Contiguous: as einsum leaves them, their sum is strided, and putting it in order a copy of (N, N).
    bias_h = torch.einsum("mnhwd,hkd->mnhwk", q, r_h).contiguous()
    bias_w = torch.einsum("mnhwd,wkd->mnhwk", q, r_w).contiguous()
    return (bias_h[..., :, None] + bias_w[..., None, :]).flatten(4, 5).flatten(2, 3)


def _check(
    qkv: Tensor,
    rel_pos_h: Tensor | None,
    rel_pos_w: Tensor | None,
    num_heads: int,
    window_size: int,
    pad_qkv: Tensor | None,
    scale: float | None,
) -> None:
    tensors = {"qkv": qkv, "rel_pos_h": rel_pos_h, "rel_pos_w": rel_pos_w, "pad_qkv": pad_qkv}
    check_tensors("rel_pos_attention", tensors, optional=("rel_pos_h", "rel_pos_w", "pad_qkv"))
    for name, number in (("num_heads", num_heads), ("window_size", window_size)):
        if not isinstance(number, (int, torch.SymInt)):
            raise TypeError(f"rel_pos_attention: {name} is {number!r}; expected an int")
    if window_size > LARGEST_WINDOW:
        raise ValueError(
            f"rel_pos_attention: window_size is {window_size}; expected a side of at most {LARGEST_WINDOW} "
            "tokens"
        )
    if num_heads < 1 or window_size < 0:
        raise ValueError(
            f"rel_pos_attention: num_heads is {num_heads} and window_size {window_size}; "
            "expected at least 1 head and a window of at least 1, or 0 for none"
        )
    if qkv.dim() != 4 or 0 in qkv.shape[1:] or qkv.shape[3] % (3 * num_heads) != 0:
        raise ValueError(
            f"rel_pos_attention: qkv has shape {tuple(qkv.shape)}; expected (B, H, W, 3·D), nothing empty "
            f"but the batch, with D divisible by {num_heads} heads"
        )
    if (rel_pos_h is None) != (rel_pos_w is None):
        given, missing = ("rel_pos_w", "rel_pos_h") if rel_pos_h is None else ("rel_pos_h", "rel_pos_w")
        raise ValueError(
            f"rel_pos_attention: {given} is given and {missing} is None; expected both or neither"
        )
    head_dim = qkv.shape[3] // (3 * num_heads)
    for side, name in zip(_window(qkv, window_size), ("rel_pos_h", "rel_pos_w"), strict=True):
        table = tensors[name]
        if table is not None and tuple(table.shape) != (2 * side - 1, head_dim):
            raise ValueError(
                f"rel_pos_attention: {name} has shape {tuple(table.shape)}; expected "
                f"({2 * side - 1}, {head_dim}) for a side of {side}: interpolate the table to this size first"
            )
    if pad_qkv is not None and tuple(pad_qkv.shape) != (qkv.shape[3],):
        raise ValueError(
            f"rel_pos_attention: pad_qkv has shape {tuple(pad_qkv.shape)}; expected ({qkv.shape[3]},), "
            "the last dimension of qkv"
        )
    if scale is not None:
        check_finite("rel_pos_attention", "scale", scale, "a finite number or None")


# ---------------------------------------------------------------- registration


def _sum_dtype(qkv: Tensor) -> torch.dtype:
    return torch.promote_types(qkv.dtype, torch.float32)


def _forward_composite(
    qkv: Tensor,
    rel_pos_h: Tensor | None,
    rel_pos_w: Tensor | None,
    pad_qkv: Tensor | None,
    num_heads: int,
    window_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    q, k, v = (t.to(_sum_dtype(qkv)) for t in _heads_of_windows(qkv, pad_qkv, num_heads, window_size))
    scores = _scores(q, k, rel_pos_h, rel_pos_w, scale, _window(qkv, window_size))
    out_MNC = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    lse_MNn = scores.logsumexp(-1).transpose(1, 2)
    out = _grid_of_windows(out_MNC, qkv, window_size).to(qkv.dtype)
    lse = _grid_of_windows(lse_MNn, qkv, window_size).permute(0, 3, 1, 2)
    return out.contiguous(), lse.contiguous()


def _scores(
    q: Tensor,
    k: Tensor,
    rel_pos_h: Tensor | None,
    rel_pos_w: Tensor | None,
    scale: float,
    window: tuple[int, int],
) -> Tensor:
    scores = scale * (q @ k.transpose(-1, -2))
    bias = _bias(q, rel_pos_h, rel_pos_w, window)
    return scores if bias is None else scores + bias


def _backward_composite(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    rel_pos_h: Tensor | None,
    rel_pos_w: Tensor | None,
    pad_qkv: Tensor | None,
    num_heads: int,
    window_size: int,
    scale: float,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h, w = window = _window(qkv, window_size)
    q, k, v = (t.to(_sum_dtype(qkv)) for t in _heads_of_windows(qkv, pad_qkv, num_heads, window_size))
    grad_MnNd = _windows(grad, None, window_size).unflatten(-1, (num_heads, -1)).transpose(1, 2).to(q.dtype)
    p = _scores(q, k, rel_pos_h, rel_pos_w, scale, window).softmax(-1)
    dp = grad_MnNd @ v.transpose(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))

    dq, dk, dv = scale * (ds @ k), scale * (ds.transpose(-1, -2) @ q), p.transpose(-1, -2) @ grad_MnNd
    grad_h = grad_w = grad_pad = grad.new_empty(0)
    if rel_pos_h is not None and rel_pos_w is not None:
        q_grid, ds_grid = q.unflatten(2, window), ds.unflatten(3, window).unflatten(2, window)
        ds_h, ds_w = ds_grid.sum(5), ds_grid.sum(4)
        offsets_h, offsets_w = _offsets(h, qkv.device), _offsets(w, qkv.device)
        dq_h = torch.einsum("mnhwk,hkd->mnhwd", ds_h, rel_pos_h.to(q.dtype)[offsets_h])
        dq_w = torch.einsum("mnhwk,wkd->mnhwd", ds_w, rel_pos_w.to(q.dtype)[offsets_w])
        dq = dq + (dq_h + dq_w).flatten(2, 3)
        # A product with the one-hot offsets adds up table rows without atomics, in a fixed order.
        if mask[1]:
            dr_h = torch.einsum("mnhwk,mnhwd->hkd", ds_h, q_grid).flatten(0, 1)
            grad_h = (F.one_hot(offsets_h.flatten(), 2 * h - 1).to(q.dtype).T @ dr_h).to(rel_pos_h.dtype)
        if mask[2]:
            dr_w = torch.einsum("mnhwk,mnhwd->wkd", ds_w, q_grid).flatten(0, 1)
            grad_w = (F.one_hot(offsets_w.flatten(), 2 * w - 1).to(q.dtype).T @ dr_w).to(rel_pos_w.dtype)

    dqkv_MNC = torch.stack([dq, dk, dv], dim=2).permute(0, 3, 2, 1, 4).flatten(2)
    dqkv = _grid_of_windows(dqkv_MNC, qkv, window_size)
    if mask[3] and pad_qkv is not None:
        inside = qkv.new_zeros(*qkv.shape[:3], 1)
        padded_MN1 = _windows(inside, qkv.new_ones(1), window_size)
        grad_pad = (dqkv_MNC * padded_MN1).sum((0, 1)).to(pad_qkv.dtype)
    grad_qkv = dqkv.to(qkv.dtype).contiguous() if mask[0] else grad.new_empty(0)
    return grad_qkv, grad_h, grad_w, grad_pad


def _forward_fake(
    qkv: Tensor,
    rel_pos_h: Tensor | None,
    rel_pos_w: Tensor | None,
    pad_qkv: Tensor | None,
    num_heads: int,
    window_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    B, H, W, C = qkv.shape
    return qkv.new_empty(B, H, W, C // 3), qkv.new_empty(B, num_heads, H, W, dtype=_sum_dtype(qkv))


def _backward_fake(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    rel_pos_h: Tensor | None,
    rel_pos_w: Tensor | None,
    pad_qkv: Tensor | None,
    num_heads: int,
    window_size: int,
    scale: float,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def shaped(like: Tensor | None, wanted: bool) -> Tensor:
        return like.new_empty(like.shape) if wanted and like is not None else grad.new_empty(0)

    dqkv, dh, dw, dpad = map(shaped, (qkv, rel_pos_h, rel_pos_w, pad_qkv), mask)
    return dqkv, dh, dw, dpad


_ARGUMENTS = (
    "Tensor? rel_pos_h, Tensor? rel_pos_w, Tensor? pad_qkv, int num_heads, int window_size, float scale"
)

# The output, and the log-sum-exp (B, n, H, W) of every query's scores, from which backward rebuilds them (in
# Triton to base 2: only the backward of the same backend reads it).
_attention_forward = define(
    f"rel_pos_attention_forward(Tensor qkv, {_ARGUMENTS}) -> (Tensor, Tensor)",
    reference=_forward_composite,
    fake=_forward_fake,
    triton="rel_pos_attention.forward",
)
_attention_backward = define(
    f"rel_pos_attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, {_ARGUMENTS}, bool[4] mask)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_backward_composite,
    fake=_backward_fake,
    triton="rel_pos_attention.backward",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, rel_pos_h, rel_pos_w, pad_qkv, ctx.num_heads, ctx.window_size, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, *output, rel_pos_h, rel_pos_w, pad_qkv)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    mask = list(ctx.needs_input_grad[:4])
    gradients = _attention_backward(grad, *ctx.saved_tensors, ctx.num_heads, ctx.window_size, ctx.scale, mask)
    wanted = [g if needed else None for g, needed in zip(gradients, mask, strict=True)]
    return (*wanted, None, None, None)


differentiate("rel_pos_attention_forward", _backward, _setup_context)
once_differentiable("rel_pos_attention_backward")
