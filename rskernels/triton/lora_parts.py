"""What forward and backward of LoRA share: the two thin products, wide to thin and thin to wide.

N rows. `wide` is a matrix of inputs or outputs (x, y, their gradients), `thin` one of ranks (x Aᵀ, g), always
float32. A part is one factor, (its ranks, its columns), which maps these columns of `wide` and those ranks of
`thin` to each other. Formulas, and why these passes: docs/kernels/lora.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rskernels.library import TRITON_DTYPES
from rskernels.triton.launch import cdiv, config, dot_precision, dtype_class, expect, launch, power_of_2

MAX_RANKS = 64  # of one tile; what has more takes several
ADDED_RANKS = 16  # of a step of add_product: more take too many registers where a factor has to be gathered


@triton.jit
def as_tf32(x):
    """Float32 rounded to TF32's ten digits, ties away from zero; the multiplier alone would cut them off."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)  # the carry would turn some NaN into zero


@triton.jit
def factor_tile(factor, rank, column, ranks, width, rank_stride, column_stride):
    """Of one part's factor; zero beyond it."""
    at = factor + rank.to(tl.int64) * rank_stride + column.to(tl.int64) * column_stride
    return tl.load(at, mask=(rank < ranks) & (column < width), other=0.0)


@triton.jit
def _project_part(
    thin, wide, factor, row, rank, rows, thin_row, wide_row, ranks, width, rank_stride, column_stride,
    RANKS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    has_row = (row < rows)[:, None]
    total = tl.zeros((BLOCK_M, RANKS), tl.float32)
    for start in range(0, width, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        at = wide + row[:, None] * wide_row + column[None, :]
        tile = tl.load(at, mask=has_row & (column < width)[None, :], other=0.0)
        f = factor_tile(factor, rank[None, :], column[:, None], ranks, width, rank_stride, column_stride)
        total = tl.dot(tile, f, total, input_precision=PRECISION)
    at = thin + row[:, None] * thin_row + rank[None, :]
    tl.store(at, total, mask=has_row & (rank < ranks)[None, :])


@triton.jit
def project(
    thin, wide, factors, rows, thin_row, wide_row, first_ranks, ranks, columns, widths,
    rank_strides, column_strides,
    PARTS: tl.constexpr, RANKS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """thin[:, ranks] = wide[:, columns] factorᵀ of every part; one block of rows and of ranks per program."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rank = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    for i in tl.static_range(PARTS):
        if tl.program_id(2) == i:
            _project_part(
                thin + first_ranks[i], wide + columns[i], factors[i], row, rank, rows, thin_row, wide_row,
                ranks[i], widths[i], rank_strides[i], column_strides[i], RANKS, PRECISION, BLOCK_M, BLOCK_K,
            )  # fmt: skip


@triton.jit
def _add_part(
    wide, thin, factor, row, column, rows, scale, wide_row, thin_row, ranks, width, rank_stride,
    column_stride,
    RANKS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    has_row = (row < rows)[:, None]
    wide_at = wide + row[:, None] * wide_row + column[None, :]
    mask = has_row & (column < width)[None, :]
    old = tl.load(wide_at, mask=mask, other=0.0)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, ranks, RANKS):
        rank = start + tl.arange(0, RANKS)
        thin_at = thin + row[:, None] * thin_row + rank[None, :]
        tile = tl.load(thin_at, mask=has_row & (rank < ranks)[None, :], other=0.0)
        if PRECISION == "tf32":
            tile = as_tf32(tile)
        f = factor_tile(factor, rank[:, None], column[None, :], ranks, width, rank_stride, column_stride)
        total = tl.dot(tile, f.to(tl.float32), total, input_precision=PRECISION)
    new = old.to(tl.float32) + scale * total
    tl.store(wide_at, new.to(wide.dtype.element_ty), mask=mask)


@triton.jit
def add_product(
    wide, thin, factors, blocks, rows, scale, wide_row, thin_row, first_ranks, ranks, columns, widths,
    rank_strides, column_strides,
    PARTS: tl.constexpr, RANKS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """wide[:, columns] += scale·thin[:, ranks] factor of every part, in place; one tile per program."""
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    block = tl.program_id(0) % blocks
    for i in tl.static_range(PARTS):
        if (block >= 0) & (block < tl.cdiv(widths[i], BLOCK_N)):
            _add_part(
                wide + columns[i], thin + first_ranks[i], factors[i], row,
                block * BLOCK_N + tl.arange(0, BLOCK_N), rows, scale, wide_row, thin_row,
                ranks[i], widths[i], rank_strides[i], column_strides[i], RANKS, PRECISION, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        block -= tl.cdiv(widths[i], BLOCK_N)


@dataclass(frozen=True)
class Part:
    """thin[:, first_rank : first_rank + rank] and wide[:, column : column + width], and what maps them."""

    factor: Tensor
    first_rank: int
    column: int

    @property
    def rank(self) -> int:
        return self.factor.shape[0]

    @property
    def width(self) -> int:
        return self.factor.shape[1]


def part_of_inputs(a: Sequence[Tensor]) -> list[Part]:
    """The A of all updates one under the other: they meet the same columns."""
    return [Part(a[0] if len(a) == 1 else torch.cat(list(a)), 0, 0)]


def parts_of_outputs(b: Sequence[Tensor], first_columns: Sequence[int]) -> list[Part]:
    """The Bᵀ of every update, each with its own ranks and columns."""
    parts, first_rank = [], 0
    for b_i, column in zip(b, first_columns, strict=True):
        parts.append(Part(b_i.t(), first_rank, column))
        first_rank += b_i.shape[1]
    return parts


def launch_project(thin: Tensor, wide: Tensor, parts: list[Part]) -> None:
    """thin = wide factorᵀ of every part."""
    most = max(part.rank for part in parts)
    constants = constants_of("project", most, wide)
    launch(
        project,
        (cdiv(len(wide), constants["BLOCK_M"]), cdiv(most, constants["RANKS"]), len(parts)),
        thin, wide, _factors(parts), len(wide), thin.stride(0), wide.stride(0), *_numbers(parts),
        PARTS=len(parts), PRECISION=dot_precision(wide.dtype), **constants,
    )  # fmt: skip


def launch_add_product(wide: Tensor, thin: Tensor, parts: list[Part], scale: float) -> None:
    """wide += scale·thin factor of every part, in place."""
    constants = constants_of("add_product", ADDED_RANKS, wide)
    blocks = sum(cdiv(part.width, constants["BLOCK_N"]) for part in parts)
    launch(
        add_product,
        (blocks * cdiv(len(wide), constants["BLOCK_M"]),),
        wide, thin, _factors(parts), blocks, len(wide), scale, wide.stride(0), thin.stride(0),
        *_numbers(parts),
        PARTS=len(parts), PRECISION=thin_precision(wide.dtype), **constants,
    )  # fmt: skip


def _factors(parts: list[Part]) -> tuple[Tensor, ...]:
    return tuple(part.factor for part in parts)


def _numbers(parts: list[Part]) -> tuple[tuple[int, ...], ...]:
    """Of every part: first rank, ranks, first column, width, strides; in the order of the kernels."""
    return (
        tuple(part.first_rank for part in parts),
        tuple(part.rank for part in parts),
        tuple(part.column for part in parts),
        tuple(part.width for part in parts),
        tuple(part.factor.stride(0) for part in parts),
        tuple(part.factor.stride(1) for part in parts),
    )


def constants_of(kernel: str, ranks: int, like: Tensor) -> dict[str, Any]:
    """RANKS, the ranks of a tile, and what is tuned for them."""
    tile = min(MAX_RANKS, power_of_2(ranks))
    return {"RANKS": tile, **config(f"lora.{kernel}", f"{dtype_class(like.dtype)}/r{tile}", like.device)}


def thin_precision(dtype: torch.dtype) -> str:
    """x Aᵀ and g stay float32 as factors: float16 would overflow at 65504, and TF32 has as many digits."""
    return dot_precision(dtype) if dtype == torch.float32 else "tf32"


def rows_of(x: Tensor) -> Tensor:
    """(N, columns), in place where the columns are neighbours."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def check(
    name: str,
    x: Tensor,
    weight: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    first_columns: Sequence[int],
) -> None:
    """What the public function has refused already; an exported graph calls the operator itself."""
    if not 0 < len(a) == len(b) == len(first_columns):
        raise ValueError(
            f"{name}: {len(a)} of a, {len(b)} of b, {len(first_columns)} columns; "
            "expected one of each per update"
        )
    for what, tensor in (("weight", weight), *(("a", a_i) for a_i in a), *(("b", b_i) for b_i in b)):
        if tensor.dim() != 2:
            raise ValueError(f"{name}: {what} has shape {tuple(tensor.shape)}; expected 2 dimensions")
    outputs, inputs = weight.shape
    if x.dim() == 0 or x.shape[-1] != inputs:
        raise ValueError(f"{name}: x has shape {tuple(x.shape)}; expected (..., {inputs})")
    free_column = 0
    for a_i, b_i, column in zip(a, b, first_columns, strict=True):
        width, rank = b_i.shape
        if rank == 0:
            raise ValueError(f"{name}: b has shape {tuple(b_i.shape)}; expected a rank of at least 1")
        expect(f"{name}: a", a_i, (rank, inputs), x)
        expect(f"{name}: b", b_i, (width, rank), x)
        if not free_column <= column <= outputs - width:
            raise ValueError(
                f"{name}: columns {list(first_columns)} with b of shape {tuple(b_i.shape)}; "
                f"expected updates in order, inside the {outputs} outputs"
            )
        free_column = column + width
    expect(f"{name}: weight", weight, (outputs, inputs), x)
    if x.dtype not in TRITON_DTYPES:
        raise ValueError(f"{name}: x is {x.dtype}; expected float32, float16 or bfloat16")
