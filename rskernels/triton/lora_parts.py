"""What forward and backward of LoRA share: the updates of one launch, and their factors as tiles.

Shapes and names as in rskernels.triton.lora.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rskernels.triton.launch import config, dot_precision, dtype_class, power_of_2

# A launch takes two parts of at most this rank; more, or higher ones, are further launches.
PARTS, MAX_RANK = 2, 64


@triton.jit
def factor(f, rank, other, has_other, rank_stride, other_stride, first, count):
    """(R, len(other)) of one part's factor: its ranks stand from `first` on, the rest is zero."""
    has_rank = (rank >= first) & (rank < first + count)
    at = f + (rank - first)[:, None] * rank_stride + other[None, :] * other_stride
    return tl.load(at, mask=has_rank[:, None] & has_other[None, :], other=0.0)


@triton.jit
def sum_of(numbers, COUNT: tl.constexpr):
    """The sum of the first COUNT of a tuple."""
    result = 0
    for i in tl.static_range(COUNT):
        result += numbers[i]
    return result


@triton.jit
def stacked_a(a, rank, column, has_column, a_ranks, a_columns, ranks, PARTS: tl.constexpr):
    """(R, len(column)): the A of all parts, one under the other."""
    tile = factor(a[0], rank, column, has_column, a_ranks[0], a_columns[0], 0, ranks[0])
    for i in tl.static_range(1, PARTS):
        first = sum_of(ranks, i)
        tile += factor(a[i], rank, column, has_column, a_ranks[i], a_columns[i], first, ranks[i])
    return tile


@dataclass(frozen=True)
class Part:
    """One update: y[:, column : column + width] += scale·(x aᵀ) bᵀ. It is the ranks `piece` of parameter
    `index`, and xa[:, first : first + rank] is its x aᵀ."""

    a: Tensor
    b: Tensor
    column: int
    first: int
    index: int
    piece: slice

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def width(self) -> int:
        return self.b.shape[0]


def launches_of(a: list[Tensor], b: list[Tensor], columns: list[int]) -> Iterator[list[Part]]:
    """The updates, one or two for each launch; a rank beyond MAX_RANK is several updates."""
    parts, first = [], 0
    for i, (a_i, b_i, column) in enumerate(zip(a, b, columns, strict=True)):
        for low in range(0, a_i.shape[0], MAX_RANK):
            piece = slice(low, low + MAX_RANK)
            parts.append(Part(a_i[piece], b_i[:, piece], column, first + low, i, piece))
        first += a_i.shape[0]
    for i in range(0, len(parts), PARTS):
        yield parts[i : i + PARTS]


def factors_of(parts: list[Part]) -> tuple[tuple[Tensor, ...], ...]:
    """A and B of every part."""
    return tuple(part.a for part in parts), tuple(part.b for part in parts)


def numbers_of(parts: list[Part]) -> tuple[tuple[int, ...], ...]:
    """Of every part: strides of A and of B, rank, first column and width, in the order of the kernels."""
    return (
        tuple(part.a.stride(0) for part in parts),
        tuple(part.a.stride(1) for part in parts),
        tuple(part.b.stride(0) for part in parts),
        tuple(part.b.stride(1) for part in parts),
        tuple(part.rank for part in parts),
        tuple(part.column for part in parts),
        tuple(part.width for part in parts),
    )


def constants_of(kernel: str, parts: list[Part], like: Tensor) -> dict[str, Any]:
    ranks = power_of_2(sum(part.rank for part in parts))
    tuned = config(f"lora.{kernel}", f"{dtype_class(like.dtype)}/r{ranks}", like.device)
    return {"PARTS": len(parts), "RANKS": ranks, **tuned}


def thin_precision(dtype: torch.dtype) -> str:
    """x Aᵀ and g stay float32 as factors: float16 would overflow at 65504, and TF32 has as many digits."""
    return dot_precision(dtype) if dtype == torch.float32 else "tf32"


def rows_of(x: Tensor) -> Tensor:
    """(N, columns), in place where the columns are neighbours."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
