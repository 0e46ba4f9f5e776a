"""SAM's attention with decomposed relative positions against eager PyTorch and SDPA with the bias."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import rskernels
from benchmarks.measure import Call, Case

WINDOW = 14  # 0 is global


def _tables(rel_pos: Tensor, size: int) -> Tensor:
    """(2·size − 1, d) -> (size, size, d): row i, column k is R[i − k + size − 1]."""
    index = torch.arange(size)
    return rel_pos[index[:, None] - index[None, :] + size - 1]


def _attend_eager(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, scale: float) -> Tensor:
    """q, k, v (B, heads, h·w, d); rel_h (B, heads, h·w, h), rel_w (…, w): SAM's own formulation."""
    scores = (q * scale) @ k.transpose(-2, -1)
    h, w = rel_h.shape[-1], rel_w.shape[-1]
    scores = (scores.unflatten(-1, (h, w)) + rel_h[..., :, None] + rel_w[..., None, :]).flatten(-2)
    return scores.softmax(-1) @ v


def _attend_sdpa(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, scale: float) -> Tensor:
    # einsum leaves the tables strided, which costs SDPA another half: the peer gets contiguous ones.
    bias = (rel_h.contiguous()[..., :, None] + rel_w.contiguous()[..., None, :]).flatten(-2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def _composed(attend: Callable[..., Tensor], qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, *,
              num_heads: int, window_size: int, pad_qkv: Tensor) -> Tensor:  # fmt: skip
    """Window partition, bias tables, attention and its inverse as the public SAM code composes them."""
    B, H, W, _ = qkv.shape
    size = window_size or None
    if size:
        pad_h, pad_w = -H % size, -W % size
        # SAM pads before the projection, so padded tokens carry the qkv bias.
        padded = pad_qkv.expand(B, H + pad_h, W + pad_w, -1).clone()
        padded[:, :H, :W] = qkv
        grid = padded.unflatten(1, (-1, size)).unflatten(3, (-1, size)).transpose(2, 3)
        x = grid.reshape(-1, size, size, qkv.shape[-1])
    else:
        x = qkv
    n, h, w, _ = x.shape
    q, k, v = x.reshape(n, h * w, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    q_grid = q.unflatten(2, (h, w))
    rel_h = torch.einsum("bnhwd,hkd->bnhwk", q_grid, _tables(rel_pos_h, h)).flatten(2, 3)
    rel_w = torch.einsum("bnhwd,wkd->bnhwk", q_grid, _tables(rel_pos_w, w)).flatten(2, 3)
    out = attend(q, k, v, rel_h, rel_w, q.shape[-1] ** -0.5).transpose(1, 2).reshape(n, h, w, -1)
    if size:
        rows, columns = (H + pad_h) // size, (W + pad_w) // size
        out = out.reshape(B, rows, columns, size, size, -1).transpose(2, 3)
        out = out.reshape(B, rows * size, columns * size, -1)[:, :H, :W]
    return out


def _build(
    grid: int, window: int, dtype: torch.dtype, train: bool, heads: int = 12, d: int = 64
) -> dict[str, Call]:
    generator = torch.Generator().manual_seed(0)
    side = window or grid

    def random(*shape: int, gain: float = 1.0) -> Tensor:
        tensor = torch.randn(*shape, generator=generator) * gain
        return tensor.to(dtype).requires_grad_(train)

    qkv = random(1, grid, grid, 3 * heads * d)
    rel_h, rel_w = random(2 * side - 1, d, gain=0.1), random(2 * side - 1, d, gain=0.1)
    pad = random(3 * heads * d, gain=0.1)
    grad = torch.randn(1, grid, grid, heads * d, generator=generator).to(dtype)
    arguments = {"num_heads": heads, "window_size": window, "pad_qkv": pad}
    forms = {
        "rskernels": partial(rskernels.rel_pos_attention, **arguments),
        "eager": partial(_composed, _attend_eager, **arguments),
        "sdpa + bias": partial(_composed, _attend_sdpa, **arguments),
    }

    def forward(form: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad():
            return form(qkv, rel_h, rel_w)

    def step(form: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(form(qkv, rel_h, rel_w), (qkv, rel_h, rel_w), grad)

    return {name: partial(step if train else forward, form) for name, form in forms.items()}


def cases() -> list[Case]:
    found = []
    for train in (False, True):
        for grid, window in ((64, 0), (32, 0), (64, WINDOW), (32, WINDOW)):
            for dtype in (torch.float32, torch.bfloat16):
                side = window or grid
                mode = "training step" if train else "forward"
                tokens = (-(-grid // side)) ** 2 * side**4  # query-key pairs over all windows
                kind = f"windows of {window}" if window else "global"
                found.append(
                    Case(
                        name=f"{mode}, {grid}x{grid} {kind}, {str(dtype)[6:]}",
                        build=partial(_build, grid, window, dtype, train),
                        dtype=dtype,
                        # QKᵀ and PV; backward has five products of that size (one recomputed).
                        flops=4 * tokens * 768 * (3.5 if train else 1),
                    )
                )
    return found
