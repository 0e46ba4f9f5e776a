"""rel_pos_attention in Triton: the gradients of the two tables, the last kernel of the backward pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rskernels.triton.launch import cdiv, dot_precision, launch, power_of_2
from rskernels.triton.rel_pos_attention_tiles import Call, load_queries, place_of, query_end, token_mask

SHARES = 128  # of the queries
PARTIAL_NUMBERS = 2**23  # that their partial results may take, 32 MiB


@triton.jit
def table_gradients(
    q_ptr, sums_ptr, partial_ptr, image_stride, row_stride, column_stride,
    heads, down, across, H, W, h, w, tokens, units, unit_shares, first_tile,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_C rows of a table (those of the rows' first), for one share of the queries: the same tiles of
    every unit_shares-th unit, so that the place of a query in its unit is found once for all of them."""
    tiles_h = tl.cdiv(2 * h - 1, BLOCK_C)
    tile = first_tile + tl.program_id(1)
    of_columns = tile >= tiles_h
    side = tl.where(of_columns, w, h)
    c = tl.where(of_columns, tile - tiles_h, tile) * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_M)
    tile_shares = tl.num_programs(0) // unit_shares
    acc = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    for first in range(tl.program_id(0) % tile_shares * BLOCK_M, tokens, tile_shares * BLOCK_M):
        i = first + r
        y, x = i // w, i % w
        known = i < tokens
        position = tl.where(of_columns, x, y) + side - 1
        key = position[None, :] - c[:, None]
        at = r[None, :] * (h + w) + key
        # Negative keys are large ones without the sign.
        there = key.to(tl.uint32) < side.to(tl.uint32)
        for unit in range(tl.program_id(0) // tile_shares, units, unit_shares):
            image, head, first_row, first_column = place_of(unit, heads, down, across, h, w)
            inside = known & (y < H - first_row) & (x < W - first_column)
            base = q_ptr + image * image_stride + head * DIM
            base += first_row.to(tl.int64) * row_stride + first_column.to(tl.int64) * column_stride
            q = load_queries(base, y, x, row_stride, column_stride, inside, DIM, BLOCK_D)
            sums = (
                sums_ptr + (tl.cast(unit, tl.int64) * tokens + first) * (h + w) + tl.where(of_columns, h, 0)
            )
            # Padded queries have sums, of 0, up to the last row inside the grid.
            end = query_end(first_row, H, w, tokens, PADDED)
            ds = tl.load(sums + at, mask=there & (i < end)[None, :], other=0.0)
            acc = tl.dot(ds.to(q.dtype), q, acc, input_precision=PRECISION)
    length = 2 * h - 1 + 2 * w - 1
    row = tl.program_id(0).to(tl.int64) * length + tl.where(of_columns, 2 * h - 1, 0) + c
    pointers = partial_ptr + row[:, None] * DIM + tl.arange(0, BLOCK_D)[None, :]
    tl.store(pointers, acc, mask=token_mask(c < 2 * side - 1, DIM, BLOCK_D))


def gradients_of_tables(
    call: Call, sums: Tensor | None, wants_h: bool, wants_w: bool
) -> tuple[Tensor, Tensor]:
    """Both gradients in float32; one that is unwanted is empty."""
    tile, (h, w) = call.tile("table_gradients"), call.side
    length_h, length_w = 2 * h - 1, 2 * w - 1
    tiles_h, tiles_w = cdiv(length_h, tile.keys), cdiv(length_w, tile.keys)
    most = max(1, min(SHARES, PARTIAL_NUMBERS // ((length_h + length_w) * call.dim)))
    tile_shares = min(most, tile.query_tiles)
    unit_shares = max(1, min(most // tile_shares, call.units))
    shares = tile_shares * unit_shares
    partial = call.qkv.new_empty(shares, length_h + length_w, call.dim, dtype=torch.float32)
    heads, down, across, H, W, _, _, tokens, _ = tile.shape()
    launch(
        table_gradients,
        (shares, tiles_h * wants_h + tiles_w * wants_w),
        call.parts()[0], sums, partial, *tile.strides(call.qkv),
        heads, down, across, H, W, h, w, tokens, call.units, unit_shares, 0 if wants_h else tiles_h,
        DIM=call.dim, BLOCK_D=power_of_2(call.dim), BLOCK_M=tile.block_m, BLOCK_C=tile.keys,
        PADDED=not tile.unpadded, PRECISION=dot_precision(call.qkv.dtype),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    nothing = partial.new_empty(0)
    return (
        partial[:, :length_h].sum(0) if wants_h else nothing,
        partial[:, length_h:].sum(0) if wants_w else nothing,
    )
