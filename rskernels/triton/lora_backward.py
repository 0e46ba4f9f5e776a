"""Gradients of LoRA: g = scale·dy B for dx and dA, and the factors' gradients as sums over slices of rows.

Shapes and names as in rskernels.triton.lora.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rskernels.triton.launch import cdiv, dot_precision, launch
from rskernels.triton.lora_parts import (
    Part,
    constants_of,
    factor,
    factors_of,
    launches_of,
    numbers_of,
    rows_of,
    stacked_a,
    sum_of,
    thin_precision,
)

# The factors' gradients are sums over slices of rows, cut by N alone, added in order: always the same bits.
SLICE_ROWS, MAX_SLICES = 512, 32


@triton.jit
def _project_part(
    thin, grad, row, has_row, b, grad_row, b_column, b_rank, first_rank, ranks, first_column, width,
    BLOCK_K: tl.constexpr, RANKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """thin + dy[:, first_column : first_column + width] B."""
    rank = tl.arange(0, RANKS)
    for start in range(0, width, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        has_column = column < width
        at = grad + row[:, None] * grad_row + (first_column + column)[None, :]
        grad_tile = tl.load(at, mask=has_row[:, None] & has_column[None, :], other=0.0)
        b_tile = factor(b, rank, column, has_column, b_rank, b_column, first_rank, ranks)
        thin = tl.dot(grad_tile, tl.trans(b_tile), thin, input_precision=PRECISION)
    return thin


@triton.jit
def add_gradient(
    grad, dx, g, a, b, rows, inputs, scale, grad_row, dx_row,
    a_ranks, a_columns, b_columns, b_ranks, ranks, columns, widths,
    PARTS: tl.constexpr, RANKS: tl.constexpr, WANTS_G: tl.constexpr, WANTS_DX: tl.constexpr,
    PRECISION: tl.constexpr, THIN_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """g = scale·dy B, kept for dA where that is wanted, and dx += g A in place."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    has_row = row < rows
    rank = tl.arange(0, RANKS)
    thin = tl.zeros((BLOCK_M, RANKS), tl.float32)
    for i in tl.static_range(PARTS):
        thin = _project_part(
            thin, grad, row, has_row, b[i], grad_row, b_columns[i], b_ranks[i], sum_of(ranks, i), ranks[i],
            columns[i], widths[i], BLOCK_K, RANKS, PRECISION,
        )  # fmt: skip
    thin *= scale
    if WANTS_G:
        all_ranks = sum_of(ranks, PARTS)
        g_at = g + row[:, None] * all_ranks + rank[None, :]
        tl.store(g_at, thin, mask=has_row[:, None] & (rank < all_ranks)[None, :])
    if WANTS_DX:
        for start in range(0, inputs, BLOCK_N):
            column = start + tl.arange(0, BLOCK_N)
            has_column = column < inputs
            a_tile = stacked_a(a, rank, column, has_column, a_ranks, a_columns, ranks, PARTS).to(tl.float32)
            at = dx + row[:, None] * dx_row + column[None, :]
            mask = has_row[:, None] & has_column[None, :]
            old = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            new = tl.dot(thin, a_tile, old, input_precision=THIN_PRECISION)
            tl.store(at, new.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def _sum_slice(
    thin, wide, partial, block, first_row, last_row, ranks, thin_row, wide_row, columns, partial_row,
    RANKS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partial = thinᵀ wide of one slice of the rows and one block of columns."""
    rank = tl.arange(0, RANKS)
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    has_rank, has_column = rank < ranks, column < columns
    total = tl.zeros((RANKS, BLOCK_N), tl.float32)
    for start in range(first_row, last_row, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K).to(tl.int64)
        has_row = row < last_row
        thin_at = thin + row[:, None] * thin_row + rank[None, :]
        thin_tile = tl.load(thin_at, mask=has_row[:, None] & has_rank[None, :], other=0.0)
        wide_at = wide + row[:, None] * wide_row + column[None, :]
        wide_tile = tl.load(wide_at, mask=has_row[:, None] & has_column[None, :], other=0.0).to(tl.float32)
        total = tl.dot(tl.trans(thin_tile), wide_tile, total, input_precision=PRECISION)
    at = partial + rank[:, None] * partial_row + column[None, :]
    tl.store(at, total, mask=has_rank[:, None] & has_column[None, :])


@triton.jit
def sum_factor_gradients(
    x, grad, g, xa, partial, rows, slice_rows, ranks, x_blocks, a_columns, x_row, grad_row, xa_row,
    partial_row, blocks, columns, widths,
    PARTS: tl.constexpr, RANKS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partial[slice] = gᵀ x, and beside it (x Aᵀ)ᵀ dy of each part; no blocks for what is not wanted."""
    block = tl.program_id(0)
    first_row = tl.program_id(1).to(tl.int64) * slice_rows
    last_row = tl.minimum(first_row + slice_rows, rows)
    partial += tl.program_id(1).to(tl.int64) * ranks * partial_row
    # A branch each, rather than a chosen pointer: the compiler then knows how every one is aligned.
    if block < x_blocks:
        _sum_slice(
            g, x, partial, block, first_row, last_row, ranks, ranks, x_row, a_columns, partial_row,
            RANKS, PRECISION, BLOCK_K, BLOCK_N,
        )  # fmt: skip
    block -= x_blocks
    for i in tl.static_range(PARTS):
        if (block >= 0) & (block < blocks[i]):
            _sum_slice(
                xa, grad + columns[i], partial + a_columns + sum_of(widths, i), block, first_row, last_row,
                ranks, xa_row, grad_row, widths[i], partial_row, RANKS, PRECISION, BLOCK_K, BLOCK_N,
            )  # fmt: skip
        block -= blocks[i]


@triton.jit
def _store_part(
    da, db, both, rank, column, first_rank, ranks, a_columns, first_column, width, scale, db_row,
    WANTS_A: tl.constexpr, WANTS_B: tl.constexpr,
):  # fmt: skip
    """One part's dA and dB out of the sum of both."""
    own = (rank >= first_rank) & (rank < first_rank + ranks)
    rank -= first_rank
    if WANTS_A:
        at = da + rank[:, None] * a_columns + column[None, :]
        tl.store(at, both.to(da.dtype.element_ty), mask=own[:, None] & (column < a_columns)[None, :])
    if WANTS_B:
        column -= first_column
        inside = (column >= 0) & (column < width)
        at = db + rank[:, None] + column[None, :] * db_row
        tl.store(at, (scale * both).to(db.dtype.element_ty), mask=own[:, None] & inside[None, :])


@triton.jit
def add_slices(
    partial, da, db, slices, a_columns, scale, widths, ranks, db_rows,
    PARTS: tl.constexpr, RANKS: tl.constexpr, WANTS_A: tl.constexpr, WANTS_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the slices in order, and give every gradient its share; dB is scaled and transposed."""
    rank = tl.arange(0, RANKS)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    all_ranks, columns = sum_of(ranks, PARTS), a_columns + sum_of(widths, PARTS)
    mask = (rank < all_ranks)[:, None] & (column < columns)[None, :]
    at = partial + rank[:, None] * columns + column[None, :]
    both = tl.zeros((RANKS, BLOCK_N), tl.float32)
    for _ in range(slices):
        both += tl.load(at, mask=mask, other=0.0)
        at += all_ranks * columns
    for i in tl.static_range(PARTS):
        _store_part(
            da[i], db[i], both, rank, column, sum_of(ranks, i), ranks[i], a_columns,
            a_columns + sum_of(widths, i), widths[i], scale, db_rows[i], WANTS_A, WANTS_B,
        )  # fmt: skip


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
    x_rows, grad_rows = rows_of(x), rows_of(grad)
    dx = (grad_rows @ weight).contiguous() if wants_x else grad.new_empty(0)
    da = [grad.new_empty(a_i.shape if wants_a else 0) for a_i in a]
    db = [grad.new_empty(b_i.shape if wants_b else 0) for b_i in b]
    for parts in launches_of(a, b, first_columns):
        g = grad.new_empty((len(x_rows), sum(part.rank for part in parts)) if wants_a else 0, dtype=xa.dtype)
        if wants_x or wants_a:
            constants = constants_of("add_gradient", parts, x)
            launch(
                add_gradient,
                (cdiv(len(x_rows), constants["BLOCK_M"]),),
                grad_rows, dx, g, *factors_of(parts),
                *x_rows.shape, scale, grad_rows.stride(0), x_rows.shape[1], *numbers_of(parts),
                WANTS_G=wants_a, WANTS_DX=wants_x, PRECISION=dot_precision(x.dtype),
                THIN_PRECISION=thin_precision(x.dtype), **constants,
            )  # fmt: skip
        if wants_a or wants_b:
            _factor_gradients(x_rows, grad_rows, g, xa, parts, scale, da, db)
    return dx.view(x.shape) if wants_x else dx, da, db


def _factor_gradients(
    x: Tensor,
    grad: Tensor,
    g: Tensor,
    xa: Tensor,
    parts: list[Part],
    scale: float,
    da: list[Tensor],
    db: list[Tensor],
) -> None:
    """dA = gᵀ x and dB = scale·dyᵀ (x Aᵀ) of one launch's parts; an empty `da` or `db` is not wanted."""
    wants_a, wants_b = da[0].dim() == 2, db[0].dim() == 2
    rows, ranks = len(x), sum(part.rank for part in parts)
    a_columns = x.shape[1] if wants_a else 0
    widths = tuple(part.width if wants_b else 0 for part in parts)
    columns = a_columns + sum(widths)
    slices = max(1, min(MAX_SLICES, cdiv(rows, SLICE_ROWS)))
    partial = x.new_empty((slices, ranks, columns), dtype=torch.float32)
    constants = constants_of("sum_factor_gradients", parts, x)
    x_blocks, *blocks = (cdiv(width, constants["BLOCK_N"]) for width in (a_columns, *widths))
    launch(
        sum_factor_gradients,
        (x_blocks + sum(blocks), slices),
        x, grad, g, xa.view(-1)[parts[0].first :], partial, rows, cdiv(rows, slices), ranks, x_blocks,
        a_columns, x.stride(0), grad.stride(0), xa.shape[-1], columns,
        tuple(blocks), tuple(part.column for part in parts), widths,
        PRECISION=thin_precision(x.dtype), **constants,
    )  # fmt: skip
    constants = constants_of("add_slices", parts, x)
    launch(
        add_slices,
        (cdiv(columns, constants["BLOCK_N"]),),
        partial,
        tuple(da[part.index][part.piece] if wants_a else None for part in parts),
        tuple(db[part.index][:, part.piece] if wants_b else None for part in parts),
        slices, a_columns, scale, widths, tuple(part.rank for part in parts),
        tuple(db[part.index].shape[-1] for part in parts),
        WANTS_A=wants_a, WANTS_B=wants_b, **constants,
    )  # fmt: skip
