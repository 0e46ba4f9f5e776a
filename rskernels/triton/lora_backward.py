"""Gradients of LoRA: g = dy B for dx and dA, and the factors' gradients as sums over slices of rows.

Shapes and names as in rskernels.triton.lora_parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rskernels.triton.launch import cdiv, expect, launch
from rskernels.triton.lora_parts import (
    Part,
    as_tf32,
    check,
    constants_of,
    launch_add_product,
    launch_project,
    part_of_inputs,
    parts_of_outputs,
    rows_of,
    thin_precision,
)

# The factors' gradients are sums over slices of rows, cut by N alone, added in order: always the same bits.
SLICE_ROWS, MAX_SLICES = 512, 32


@triton.jit
def _sum_slice(
    thin, wide, partial, block, first_row, last_row, ranks, thin_row, wide_row, columns, partial_row,
    RANKS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partial = thinᵀ wide of one slice of the rows, one block of ranks and one of columns."""
    rank = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    has_rank, has_column = rank < ranks, column < columns
    total = tl.zeros((RANKS, BLOCK_N), tl.float32)
    for start in range(first_row, last_row, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K).to(tl.int64)
        has_row = row < last_row
        thin_at = thin + row[:, None] * thin_row + rank[None, :]
        thin_tile = tl.load(thin_at, mask=has_row[:, None] & has_rank[None, :], other=0.0)
        if PRECISION == "tf32":
            thin_tile = as_tf32(thin_tile)
        wide_at = wide + row[:, None] * wide_row + column[None, :]
        wide_tile = tl.load(wide_at, mask=has_row[:, None] & has_column[None, :], other=0.0).to(tl.float32)
        total = tl.dot(tl.trans(thin_tile), wide_tile, total, input_precision=PRECISION)
    at = partial + rank[:, None] * partial_row + column[None, :]
    tl.store(at, total, mask=has_rank[:, None] & has_column[None, :])


@triton.jit
def sum_factor_gradients(
    x, grad, g, xa, partial, rows, slice_rows, all_ranks, x_blocks, a_columns, x_row, grad_row, xa_row,
    partial_row, blocks, columns, widths, first_ranks, ranks,
    PARTS: tl.constexpr, RANKS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partial[slice] = gᵀ x, and beside it (x Aᵀ)ᵀ dy of each part; no blocks for what is not wanted."""
    block = tl.program_id(0)
    first_row = tl.program_id(1).to(tl.int64) * slice_rows
    last_row = tl.minimum(first_row + slice_rows, rows)
    partial += tl.program_id(1).to(tl.int64) * all_ranks * partial_row
    # A branch each, rather than a chosen pointer: the compiler then knows how every one is aligned.
    if block < x_blocks:
        _sum_slice(
            g, x, partial, block, first_row, last_row, all_ranks, all_ranks, x_row, a_columns, partial_row,
            RANKS, PRECISION, BLOCK_K, BLOCK_N,
        )  # fmt: skip
    block -= x_blocks
    partial += a_columns
    for i in tl.static_range(PARTS):
        if (block >= 0) & (block < blocks[i]) & (tl.program_id(2) * RANKS < ranks[i]):
            _sum_slice(
                xa + first_ranks[i], grad + columns[i], partial + first_ranks[i] * partial_row, block,
                first_row, last_row, ranks[i], xa_row, grad_row, widths[i], partial_row,
                RANKS, PRECISION, BLOCK_K, BLOCK_N,
            )  # fmt: skip
        block -= blocks[i]
        partial += widths[i]


@triton.jit
def _store_part(
    da, db, both, rank, column, ranks, a_columns, first_column, width, scale, db_row,
    WANTS_A: tl.constexpr, WANTS_B: tl.constexpr,
):  # fmt: skip
    """One part's dA and dB out of the sum of both."""
    own = ((rank >= 0) & (rank < ranks))[:, None]
    if WANTS_A:
        at = da + rank[:, None] * a_columns + column[None, :]
        tl.store(at, (scale * both).to(da.dtype.element_ty), mask=own & (column < a_columns)[None, :])
    if WANTS_B:
        column -= first_column
        inside = (column >= 0) & (column < width)
        at = db + rank[:, None] + column[None, :] * db_row
        tl.store(at, (scale * both).to(db.dtype.element_ty), mask=own & inside[None, :])


@triton.jit
def add_slices(
    partial, da, db, slices, all_ranks, a_columns, columns, scale, widths, first_ranks, ranks,
    PARTS: tl.constexpr, RANKS: tl.constexpr, WANTS_A: tl.constexpr, WANTS_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the slices in order, and give every gradient its share, scaled, dB transposed."""
    rank = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rank < all_ranks)[:, None] & (column < columns)[None, :]
    at = partial + rank[:, None] * columns + column[None, :]
    both = tl.zeros((RANKS, BLOCK_N), tl.float32)
    for _ in range(slices):
        both += tl.load(at, mask=mask, other=0.0)
        at += all_ranks * columns
    first_column = a_columns
    for i in tl.static_range(PARTS):
        _store_part(
            da[i], db[i], both, rank - first_ranks[i], column, ranks[i], a_columns,
            first_column, widths[i], scale, ranks[i], WANTS_A, WANTS_B,
        )  # fmt: skip
        first_column += widths[i]


def backward(
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
    """rskernels::lora_backward: dx, dA and dB, each empty where mask says that nobody asks for it."""
    wants_x, wants_a, wants_b = mask
    name, ranks = "lora_backward", sum(a_i.shape[0] for a_i in a)
    check(name, x, weight, a, b, first_columns)
    expect(f"{name}: grad", grad, (*x.shape[:-1], weight.shape[0]), x)
    if wants_b:
        expect(f"{name}: xa", xa, (*x.shape[:-1], ranks), x, torch.float32)
    x_rows, grad_rows, xa_rows = rows_of(x), rows_of(grad), rows_of(xa)
    parts = parts_of_outputs(b, first_columns)
    dx = (grad_rows @ weight).contiguous() if wants_x else grad.new_empty(0)
    da = [grad.new_empty(a_i.shape if wants_a else 0) for a_i in a]
    db = [grad.new_empty(b_i.shape if wants_b else 0) for b_i in b]
    g = grad.new_empty((len(x_rows), ranks) if wants_x or wants_a else 0, dtype=torch.float32)
    if wants_x or wants_a:
        launch_project(g, grad_rows, parts)
    if wants_x:
        launch_add_product(dx, g, part_of_inputs(a), scale)
    if wants_a or wants_b:
        _factor_gradients(x_rows, grad_rows, g, xa_rows, parts, scale, da, db)
    return dx.view(x.shape) if wants_x else dx, da, db


def _factor_gradients(
    x: Tensor,
    grad: Tensor,
    g: Tensor,
    xa: Tensor,
    parts: Sequence[Part],
    scale: float,
    da: list[Tensor],
    db: list[Tensor],
) -> None:
    """dA = scale·gᵀ x and dB = scale·dyᵀ (x Aᵀ); an empty `da` or `db` is not wanted."""
    wants_a, wants_b = da[0].dim() == 2, db[0].dim() == 2
    rows, all_ranks = len(x), sum(part.rank for part in parts)
    first_ranks, ranks = tuple(part.first_rank for part in parts), tuple(part.rank for part in parts)
    a_columns = x.shape[1] if wants_a else 0
    widths = tuple(part.width if wants_b else 0 for part in parts)
    columns = a_columns + sum(widths)
    slices = max(1, min(MAX_SLICES, cdiv(rows, SLICE_ROWS)))
    partial = x.new_empty((slices, all_ranks, columns), dtype=torch.float32)
    constants = constants_of("sum_factor_gradients", all_ranks, x)
    x_blocks, *blocks = (cdiv(width, constants["BLOCK_N"]) for width in (a_columns, *widths))
    launch(
        sum_factor_gradients,
        (x_blocks + sum(blocks), slices, cdiv(all_ranks, constants["RANKS"])),
        x, grad, g, xa, partial, rows, cdiv(rows, slices), all_ranks, x_blocks, a_columns,
        x.stride(0), grad.stride(0), xa.stride(0), columns,
        tuple(blocks), tuple(part.column for part in parts), widths, first_ranks, ranks,
        PARTS=len(parts), PRECISION=thin_precision(x.dtype), **constants,
    )  # fmt: skip
    constants = constants_of("add_slices", all_ranks, x)
    launch(
        add_slices,
        (cdiv(columns, constants["BLOCK_N"]), cdiv(all_ranks, constants["RANKS"])),
        partial,
        tuple(da_i if wants_a else None for da_i in da), tuple(db_i if wants_b else None for db_i in db),
        slices, all_ranks, a_columns, columns, scale, widths, first_ranks, ranks,
        PARTS=len(parts), WANTS_A=wants_a, WANTS_B=wants_b, **constants,
    )  # fmt: skip
