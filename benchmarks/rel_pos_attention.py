"""SAM's attention with decomposed relative positions, and plain attention, against eager PyTorch, SDPA and
FlexAttention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import rskernels
from benchmarks import attention_peers
from benchmarks.measure import PASSES, Call, Case, batches, call_of, device, dtypes, floor, on_gpu

WINDOW = 14  # 0 is global


def _tables(rel_pos: Tensor, size: int) -> Tensor:
    """(2·size − 1, d) -> (size, size, d): row i, column k is R[i − k + size − 1]."""
    index = torch.arange(size, device=rel_pos.device)
    return rel_pos[index[:, None] - index[None, :] + size - 1]


def _attend_eager(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, scale: float) -> Tensor:
    """q, k, v (B, heads, h·w, d); rel_h (B, heads, h·w, h), rel_w (…, w): SAM's own formulation."""
    scores = (q * scale) @ k.transpose(-2, -1)
    h, w = rel_h.shape[-1], rel_w.shape[-1]
    scores = (scores.unflatten(-1, (h, w)) + rel_h[..., :, None] + rel_w[..., None, :]).flatten(-2)
    return scores.softmax(-1) @ v


def _attend_biased(
    attend: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    scale: float,
) -> Tensor:
    # einsum leaves the tables strided, which costs SDPA another half: the peer gets contiguous ones.
    bias = (rel_h.contiguous()[..., :, None] + rel_w.contiguous()[..., None, :]).flatten(-2)
    return attend(q, k, v, attn_mask=bias, scale=scale)


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


@functools.cache
def _flex() -> Callable[..., Tensor]:
    """FlexAttention, compiled; the bias as a score_mod that reads the two tables of a query."""
    from torch.nn.attention.flex_attention import flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, scale: float) -> Tensor:
        width = rel_w.shape[-1]

        def biased(score: Tensor, b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return score + rel_h[b, head, query, key // width] + rel_w[b, head, query, key % width]

        out = flex_attention(q, k, v, score_mod=biased, scale=scale)
        assert isinstance(out, Tensor)
        return out

    compiled: Callable[..., Tensor] = torch.compile(attend, dynamic=False)

    def contiguous(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, scale: float) -> Tensor:
        return compiled(*(t.contiguous() for t in (q, k, v, rel_h, rel_w)), scale)

    return contiguous


@functools.cache
def flex_problem() -> str:
    """Why FlexAttention is no peer here, or nothing. It needs a C++ compiler at run time, and AVX2."""
    q = torch.zeros(1, 2, 256, 64)
    table = torch.zeros(1, 2, 256, 16)
    try:
        with torch.no_grad():
            _flex()(q, q, q, table, table, 0.125)
    except Exception as error:  # whatever the compiler raises: the other peers still count
        return (
            f"FlexAttention does not compile here: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
        )
    return ""


@dataclass(frozen=True)
class Shape:
    """A call: batch, grid, window side (0: global), heads, head dim; plain attention without tables."""

    batch: int
    height: int
    width: int
    window: int = 0
    heads: int = 12
    d: int = 64
    tables: bool = True

    def __str__(self) -> str:
        if not self.tables:
            return f"{self.batch}x{self.height} tokens, {self.heads} heads, plain"
        kind = f"windows of {self.window}" if self.window else "global"
        small = "" if (self.heads, self.d) == (12, 64) else f", {self.heads} heads of {self.d}"
        return f"{self.batch}x{self.height}x{self.width} {kind}{small}"

    def pairs(self) -> int:
        """Of a query and a key: real queries, all keys of their windows."""
        keys = self.window**2 if self.window else self.height * self.width
        return self.batch * self.height * self.width * keys


def _build(shape: Shape, dtype: torch.dtype, which: str) -> dict[str, Call]:
    generator = torch.Generator().manual_seed(0)
    B, H, W, D = shape.batch, shape.height, shape.width, shape.heads * shape.d
    rows, columns = (shape.window, shape.window) if shape.window else (H, W)

    def random(*size: int, gain: float = 1.0) -> Tensor:
        tensor = torch.randn(*size, generator=generator) * gain
        return tensor.to(device(), dtype).requires_grad_(which != "forward")

    inputs = [random(B, H, W, 3 * D)]
    grad = torch.randn(B, H, W, D, generator=generator).to(device(), dtype)
    forms: dict[str, Callable[..., Tensor]]

    def plain(attend: Callable[..., Tensor], qkv: Tensor, *_: Tensor) -> Tensor:
        q, k, v = qkv.reshape(B, H * W, 3, shape.heads, -1).permute(2, 0, 3, 1, 4)
        return attend(q, k, v).transpose(1, 2).reshape(B, H, W, D)

    if not shape.tables:

        def ours(qkv: Tensor) -> Tensor:
            return rskernels.rel_pos_attention(qkv, None, None, num_heads=shape.heads)

        forms = {
            "rskernels": ours,
            "eager": partial(plain, lambda q, k, v: (q * shape.d**-0.5 @ k.mT).softmax(-1) @ v),
            "sdpa": partial(plain, F.scaled_dot_product_attention),
        }
        if on_gpu():
            others = attention_peers.sdpa(biased=False) | {"xformers": attention_peers.xformers}
            forms |= {name: partial(plain, attend) for name, attend in others.items()}
    else:
        inputs += [random(2 * side - 1, shape.d, gain=0.1) for side in (rows, columns)]
        inputs.append(random(3 * D, gain=0.1))
        pads = shape.window > 0 and (H % shape.window > 0 or W % shape.window > 0)
        inputs[3].requires_grad_(pads and which != "forward")  # no gradient where nothing is padded
        arguments: dict[str, Any] = {"num_heads": shape.heads, "window_size": shape.window}

        def fused(qkv: Tensor, rel_h: Tensor, rel_w: Tensor, pad: Tensor) -> Tensor:
            return rskernels.rel_pos_attention(qkv, rel_h, rel_w, pad_qkv=pad, **arguments)

        def composed(attend: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
            qkv, rel_h, rel_w, pad = tensors
            return _composed(attend, qkv, rel_h, rel_w, pad_qkv=pad, **arguments)

        forms = {
            "rskernels": fused,
            "eager": partial(composed, _attend_eager),
            "sdpa + bias": partial(composed, partial(_attend_biased, F.scaled_dot_product_attention)),
        }
        # It has no CPU backward, and refuses windows (lengths that are no multiple of its blocks).
        if on_gpu():
            others = attention_peers.sdpa(biased=True) | {"xformers": attention_peers.xformers}
            forms |= {
                f"{name} + bias": partial(composed, partial(_attend_biased, attend))
                for name, attend in others.items()
            }
            forms["eager, compiled"] = torch.compile(partial(composed, _attend_eager), dynamic=False)
        if on_gpu() or (which == "forward" and shape.window == 0 and not flex_problem()):
            forms["flex, compiled"] = partial(composed, _flex())
    calls = {name: call_of(which, form, inputs, grad) for name, form in forms.items()}
    if on_gpu() and shape.tables and shape.window == 0:
        for name, attend in attention_peers.sdpa(biased=False).items():
            if f"{name}, no bias" in FLOORS:
                less = call_of(which, partial(plain, attend), inputs[:1], grad)
                calls[f"{name}, no bias"] = floor(less, calls["eager"])
    return calls


SHAPES = (
    Shape(1, 64, 64),
    Shape(1, 64, 64, WINDOW),
    *(Shape(2, 32, 32, window) for window in (0, WINDOW)),
    # the tiny models of the demo and the tests
    Shape(8, 16, 16, 4, heads=4, d=32),
    # DINOv2: 518 pixels and a class token
    Shape(1, 1370, 1, tables=False),
)
# They leave the tables out.
FLOORS = ("sdpa, flash, no bias", "sdpa, efficient, no bias", "sdpa, cuDNN, no bias")
# Products of the size of QKᵀ: two forward; backward recomputes one and makes four.
PRODUCTS = {"forward": 2, "backward": 5, "both": 7}


def cases() -> list[Case]:
    shapes = [replace(shape, batch=batches() * shape.batch) for shape in SHAPES]
    return [
        Case(
            name=f"{which}, {shape}, {str(dtype)[6:]}",
            build=partial(_build, shape, dtype, which),
            dtype=dtype,
            flops=2 * PRODUCTS[which] * shape.pairs() * shape.heads * shape.d,
            beside=FLOORS if on_gpu() else (),
        )
        for which in PASSES
        for shape in shapes
        for dtype in dtypes()
    ]
