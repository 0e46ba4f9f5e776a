"""rel_pos_attention in Triton: the forward pass, and what the tools ask of the operator's kernels.

An online softmax over key tiles (Dao, "FlashAttention-2", arXiv:2307.08691) with the bias added to a tile
from two small tensors; see rel_pos_attention_tiles for the tiles, docs/kernels/rel_pos_attention.md for why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rskernels.triton.launch import launch
from rskernels.triton.rel_pos_attention_backward import backward
from rskernels.triton.rel_pos_attention_tiles import (
    LOG2E,
    Call,
    add_biases,
    load_biases,
    load_keys,
    load_queries,
    place_of,
    query_biases,
    query_end,
    span_of,
    token_mask,
)

__all__ = ["backward", "candidates", "examples", "forward"]


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, k_pad, v_pad, table_h, table_w, rel_ptr, out_ptr, lse_ptr,
    image_stride, row_stride, column_stride,
    heads, down, across, H, W, h, w, tokens, plane, scale,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    BLOCK_C: tl.constexpr, TABLES: tl.constexpr, PAD: tl.constexpr, PADDED: tl.constexpr, EVEN: tl.constexpr,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(tokens, BLOCK_M)
    unit = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * BLOCK_M
    image, head, first_row, first_column = place_of(unit, heads, down, across, h, w)
    end = query_end(first_row, H, w, tokens, PADDED)
    if PADDED:
        nothing = first >= end
        if nothing:
            return
    r = tl.arange(0, BLOCK_M)
    i = first + r
    y, x = i // w, i % w
    known = i < end
    inside = known & (first_row + y < H) & (first_column + x < W)
    base = image * image_stride + head * DIM
    q = load_queries(
        q_ptr + base, first_row + y, first_column + x, row_stride, column_stride, inside, DIM, BLOCK_D
    )
    if TABLES:
        span = span_of(tokens)
        rel = rel_ptr + unit.to(tl.int64) * (h + w) * span + first
        columns = query_biases(
            q, table_h, table_w, rel, r, y, x, known, h, w, span, DIM, BLOCK_D, BLOCK_C, PRECISION
        )

    n = tl.arange(0, ROWS * COLS)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for x0 in range(0, w, COLS):
        key_x = x0 + n % COLS
        if TABLES:
            rel_w = tl.trans(load_biases(columns, r, x0 + tl.arange(0, COLS), known, w, span))
        for y0 in range(0, h, ROWS):
            key_y = y0 + n // COLS
            valid = (key_x < w) & (key_y * w + key_x < tokens)
            row, column = first_row + key_y, first_column + key_x
            seen = (row < H) & (column < W)
            k = load_keys(
                k_ptr + base, k_pad + head * DIM if PAD else None, row, column, row_stride, column_stride,
                valid, seen, DIM, BLOCK_D, PAD, WHOLE,
            )  # fmt: skip
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
            if TABLES:
                rel_h = tl.trans(load_biases(rel, r, y0 + tl.arange(0, ROWS), known, h, span))
                # A tile of one row has one rel_h for every query, which its maximum and its sum can have.
                if ROWS == 1:
                    s += rel_w
                else:
                    s = add_biases(s, rel_h, rel_w, BLOCK_M, ROWS, COLS)
            if not EVEN:
                s = tl.where(valid[None, :], s, float("-inf"))
            # Every tile has a valid key: the maximum is finite from the first one on.
            if TABLES and ROWS == 1:
                of_row = tl.sum(rel_h, 1)
                grown = tl.maximum(largest, tl.max(s, 1) + of_row)
                p = tl.exp2(s + (of_row - grown)[:, None])
            else:
                grown = tl.maximum(largest, tl.max(s, 1))
                p = tl.exp2(s - grown[:, None])
            shrink = tl.exp2(largest - grown)
            total = total * shrink + tl.sum(p, 1)
            v = load_keys(
                v_ptr + base, v_pad + head * DIM if PAD else None, row, column, row_stride, column_stride,
                valid, seen, DIM, BLOCK_D, PAD, WHOLE,
            )  # fmt: skip
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
            largest = grown

    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    token = image * plane + (first_row + y) * W + first_column + x
    pointers = out_ptr + (token * heads + head)[:, None] * DIM + tl.arange(0, BLOCK_D)[None, :]
    tl.store(pointers, out, mask=token_mask(inside, DIM, BLOCK_D))
    position = (image * heads + head) * plane + (first_row + y) * W + first_column + x
    tl.store(lse_ptr + position, largest + tl.log2(total), mask=inside)


def forward(
    qkv: Tensor,
    rel_pos_h: Tensor | None,
    rel_pos_w: Tensor | None,
    pad_qkv: Tensor | None,
    num_heads: int,
    window_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output (B, H, W, D) and the log-sum-exp (B, n, H, W) of every query's logits, to base 2: as
    `backward` subtracts it, so that it is rounded once."""
    B, H, W, C = qkv.shape
    call = Call.of(qkv, rel_pos_h, rel_pos_w, pad_qkv, num_heads, window_size, scale)
    tile = call.tile("forward")
    out, lse = (
        qkv.new_empty(B, H, W, C // 3),
        qkv.new_empty(B, num_heads, H, W, dtype=torch.float32),
    )
    launch(
        forward_kernel,
        (tile.query_tiles * call.units,),
        *call.parts(), *call.pads_of_keys(), call.rel_pos_h, call.rel_pos_w, call.biases(), out, lse,
        *tile.strides(call.qkv), *tile.shape(), scale,
        **tile.constants(), **tile.query_constants(),
    )  # fmt: skip
    return out, lse


# (BLOCK_M, BLOCK_N, num_warps) by kernel, dtype and head dim, the most promising first. A tile's logits, its
# biases and the sums over its keys share the registers with one accumulator of the head dim (two in
# key_gradients): tiles shrink as the head dim grows, and for float32, whose products take three passes over
# twice the bytes.
_TILES: dict[tuple[str, str], dict[int, list[tuple[int, int, int]]]] = {
    ("forward", "half"): {
        64: [(128, 64, 8), (128, 128, 8), (64, 64, 4), (128, 32, 8), (64, 32, 4)],
        128: [(128, 64, 8), (64, 64, 4), (128, 32, 8), (64, 32, 4), (64, 32, 8), (32, 32, 4)],
        256: [(128, 32, 8), (64, 32, 4), (64, 32, 8), (64, 16, 8), (32, 32, 8), (32, 32, 4)],
    },
    ("forward", "float"): {
        64: [(64, 32, 4), (64, 32, 8), (32, 32, 4), (32, 32, 2)],
    },
    ("query_gradients", "half"): {
        64: [(64, 64, 8), (32, 64, 8), (128, 32, 8), (64, 32, 4)],
        128: [(128, 32, 8), (64, 32, 8), (32, 32, 8), (32, 32, 4)],
        256: [(64, 32, 8), (32, 32, 8), (32, 16, 8), (16, 32, 8)],
    },
    ("query_gradients", "float"): {
        64: [(32, 32, 4), (32, 16, 4), (16, 16, 8), (16, 16, 4)],
    },
    ("key_gradients", "half"): {
        64: [(64, 128, 8), (64, 64, 4), (32, 64, 4), (32, 64, 8)],
        128: [(64, 64, 8), (32, 64, 4), (32, 64, 8), (32, 32, 4)],
        256: [(32, 64, 8), (32, 32, 8), (16, 32, 8), (16, 32, 4)],
    },
    ("key_gradients", "float"): {
        64: [(32, 64, 8), (32, 32, 4), (16, 32, 4), (16, 16, 4)],
    },
    ("table_gradients", "half"): {256: [(64, 64, 8), (64, 64, 4), (64, 32, 8), (64, 32, 4), (32, 32, 4)]},
    ("table_gradients", "float"): {256: [(32, 32, 8), (32, 32, 4), (16, 32, 4), (16, 16, 4)]},
}


def candidates(kernel: str, shape_class: str) -> list[dict[str, int]]:
    """Configurations worth trying, the most promising first.

    kernel: "forward", "query_gradients", "key_gradients" or "table_gradients"; shape_class: "half/d64",
    "float/d32" and so on.
    """
    dtype, head_dim = shape_class.split("/")
    dim = int(head_dim.removeprefix("d"))
    by_dim = _TILES[kernel, dtype]
    tiles = by_dim[min(d for d in by_dim if d >= dim)]
    few = len(tiles) <= 4  # one stage takes the fewest registers; no more than 12 in all
    return [
        {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
        for m, n, warps in tiles
        for stages in ((1, 2, 3) if few else (2, 3))
    ]


def examples() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Forward and backward at the shapes of the library's models, and one call of every other class."""
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for B, H, W, heads, dim, window, tables in (
            (1, 64, 64, 12, 64, 0, True),  # SAM ViT-B, global
            (1, 64, 64, 12, 64, 14, True),  # and in windows
            (1, 32, 32, 16, 80, 0, True),  # ViT-H
            (1, 32, 32, 16, 80, 14, True),
            (1, 1, 1370, 16, 64, 0, False),  # DINOv2
            (1, 40, 40, 4, 32, 0, True),
            (1, 1, 33, 4, 32, 0, True),
            (1, 16, 16, 4, 32, 0, True),
            (1, 20, 20, 4, 32, 0, True),
            (1, 20, 20, 2, 256, 0, True),
            (1, 16, 16, 2, 256, 7, True),
            (1, 1, 1, 1, 16, 0, True),  # sizes of 1 are constants to the compiler
            (1, 1, 1, 1, 16, 1, True),
        ):
            if dtype == torch.float32 and dim > 64:
                continue  # the reference's
            side = (window, window) if window else (H, W)
            qkv = torch.empty(B, H, W, 3 * heads * dim, dtype=dtype)
            table_h, table_w = (torch.empty(2 * s - 1, dim, dtype=dtype) if tables else None for s in side)
            pad = qkv.new_empty(qkv.shape[3]) if window else None
            out, lse = torch.empty(B, H, W, heads * dim, dtype=dtype), torch.empty(B, heads, H, W)
            arguments = (table_h, table_w, pad, heads, window, dim**-0.5)

            def both(qkv: Any = qkv, out: Any = out, lse: Any = lse, arguments: Any = arguments) -> None:
                forward(qkv, *arguments)
                backward(out, qkv, out, lse, *(*arguments, [True] * 4))

            where = f"windows of {window}" if window else "global"
            yield f"{H}x{W} {where}, d {dim}, {name}", both
