"""lora_linear, lora_qkv: the thin products of a low-rank update, around cuBLAS's large one.

N rows, I inputs, O outputs, R the ranks of all parts side by side, in a tile padded to a power of two. A part
is one (A, B) pair and the columns of y that it updates. Formulas, and why these passes: docs/kernels/lora.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rskernels.triton.launch import cdiv, dot_precision, launch
from rskernels.triton.lora_backward import backward
from rskernels.triton.lora_parts import (
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


@triton.jit
def _update_part(
    y, row, has_row, thin, b, y_row, b_column, b_rank, first_rank, ranks, first_column, width,
    BLOCK_N: tl.constexpr, RANKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y[:, first_column : first_column + width] += thin Bᵀ, in float32."""
    rank = tl.arange(0, RANKS)
    for start in range(0, width, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        has_column = column < width
        at = y + row[:, None] * y_row + (first_column + column)[None, :]
        mask = has_row[:, None] & has_column[None, :]
        b_tile = factor(b, rank, column, has_column, b_rank, b_column, first_rank, ranks).to(tl.float32)
        old = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        new = tl.dot(thin, b_tile, old, input_precision=PRECISION)
        tl.store(at, new.to(y.dtype.element_ty), mask=mask)


@triton.jit
def add_update(
    x, y, xa, a, b, rows, inputs, scale, x_row, y_row, xa_row,
    a_ranks, a_columns, b_columns, b_ranks, ranks, columns, widths,
    PARTS: tl.constexpr, RANKS: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
    THIN_PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y += scale·(x Aᵀ) Bᵀ in place, one block of rows per program, which reads its x once."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    has_row = row < rows
    rank = tl.arange(0, RANKS)
    thin = tl.zeros((BLOCK_M, RANKS), tl.float32)
    for start in range(0, inputs, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        has_column = column < inputs
        mask = has_row[:, None] & has_column[None, :]
        x_tile = tl.load(x + row[:, None] * x_row + column[None, :], mask=mask, other=0.0)
        a_tile = stacked_a(a, rank, column, has_column, a_ranks, a_columns, ranks, PARTS)
        thin = tl.dot(x_tile, tl.trans(a_tile), thin, input_precision=PRECISION)
    if KEEP:
        has_rank = rank < sum_of(ranks, PARTS)
        tl.store(xa + row[:, None] * xa_row + rank[None, :], thin, mask=has_row[:, None] & has_rank[None, :])
    thin *= scale
    for i in tl.static_range(PARTS):
        if i > 0:
            tl.debug_barrier()  # two pieces of one high rank update the same columns
        _update_part(
            y, row, has_row, thin, b[i], y_row, b_columns[i], b_ranks[i], sum_of(ranks, i), ranks[i],
            columns[i], widths[i], BLOCK_N, RANKS, THIN_PRECISION,
        )  # fmt: skip


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: list[Tensor],
    b: list[Tensor],
    first_columns: list[int],
    scale: float,
    keep_xa: bool,
) -> tuple[Tensor, Tensor]:
    """rskernels::lora_forward: y, and x Aᵀ (float32) where it is kept."""
    out = torch.ops.rskernels.linear_forward(x, weight, bias, "none", False)[0]
    x_rows = rows_of(x)
    y = out.view(len(x_rows), out.shape[-1])
    ranks = sum(a_i.shape[0] for a_i in a)
    xa = x.new_empty((*x.shape[:-1], ranks) if keep_xa else 0, dtype=torch.float32)
    for parts in launches_of(a, b, first_columns):
        constants = constants_of("add_update", parts, x)
        launch(
            add_update,
            (cdiv(len(x_rows), constants["BLOCK_M"]),),
            x_rows, y, xa.view(-1)[parts[0].first :], *factors_of(parts),
            *x_rows.shape, scale, x_rows.stride(0), y.stride(0), ranks, *numbers_of(parts),
            KEEP=keep_xa, PRECISION=dot_precision(x.dtype), THIN_PRECISION=thin_precision(x.dtype),
            **constants,
        )  # fmt: skip
    return out, xa


def candidates(kernel: str, shape_class: str) -> list[dict[str, int]]:
    """Configurations that the tuner tries for `kernel` ("add_update", …) and `shape_class` ("half/r16")."""
    dtype, ranks = shape_class.split("/r")
    wide = 64 if dtype == "float" or int(ranks) > 32 else 128
    if kernel == "add_slices":
        return [{"BLOCK_N": n, "num_warps": 4, "num_stages": 1} for n in (16, 32, 64)]
    if kernel == "sum_factor_gradients":
        return [
            {"BLOCK_K": k, "BLOCK_N": n, "num_warps": 4, "num_stages": stages}
            for k in (32, 64)
            for n in (64, wide)
            for stages in (2, 3, 4)
        ]
    return [
        {"BLOCK_M": m, "BLOCK_K": wide, "BLOCK_N": wide, "num_warps": warps, "num_stages": stages}
        for m in (16, 32, 64)
        for warps in (4, 8)
        for stages in (2, 3)
    ]


def examples() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls with the shapes of the ViTs; nothing is computed on the meta device."""
    for dtype in (torch.float32, torch.bfloat16):
        for rank in (4, 16, 32, 64):
            yield f"ViT-B qkv, rank {rank}, {str(dtype)[6:]}", _example(dtype, 768, rank, 2)
        yield f"linear, rank 4, {str(dtype)[6:]}", _example(dtype, 1024, 4, 1)
        yield f"odd sizes, rank 3, {str(dtype)[6:]}", _example(dtype, 77, 3, 2)
        # Sizes of 1 are constants to the compiler.
        yield f"sizes of 1, {str(dtype)[6:]}", _example(dtype, 1, 1, 2, rows=1)


def _example(dtype: torch.dtype, dim: int, rank: int, parts: int, rows: int = 4096) -> Callable[[], None]:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def call() -> None:
        outputs = 3 * dim if parts == 2 else dim
        x, weight, bias = empty(rows, dim), empty(outputs, dim), empty(outputs)
        a, b = [empty(rank, dim)] * parts, [empty(dim, rank)] * parts
        columns = [0, 2 * dim][:parts]
        forward(x, weight, bias, a, b, columns, 0.5, True)
        xa = empty(rows, parts * rank, dtype=torch.float32)
        backward(empty(rows, outputs), x, weight, a, b, xa, columns, 0.5, [True] * 3)

    return call
