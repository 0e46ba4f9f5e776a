"""lora_linear, lora_qkv: the thin products of a low-rank update, around cuBLAS's large one.

Shapes and names as in rskernels.triton.lora_parts. Formulas, and why these passes: docs/kernels/lora.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from rskernels.triton.lora_backward import backward
from rskernels.triton.lora_parts import (
    check,
    launch_add_product,
    launch_project,
    part_of_inputs,
    parts_of_outputs,
    rows_of,
)


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
    check("lora_forward", x, weight, a, b, first_columns)
    out = torch.ops.rskernels.linear_forward(x, weight, bias, "none", False)[0]
    x_rows, parts = rows_of(x), parts_of_outputs(b, first_columns)
    xa = x.new_empty((*x.shape[:-1], sum(a_i.shape[0] for a_i in a)), dtype=torch.float32)
    xa_rows = xa.view(len(x_rows), xa.shape[-1])
    launch_project(xa_rows, x_rows, part_of_inputs(a))
    launch_add_product(out.view(len(x_rows), out.shape[-1]), xa_rows, parts, scale)
    return out, xa if keep_xa else xa.new_empty(0)


def candidates(kernel: str, shape_class: str) -> list[dict[str, int]]:
    """Configurations that the tuner tries for `kernel` ("project", …) and `shape_class` ("half/r16")."""
    dtype, ranks = shape_class.split("/r")
    wide = 64 if dtype == "float" or int(ranks) > 32 else 128
    if kernel == "add_slices":
        return [{"BLOCK_N": n, "num_warps": 4, "num_stages": 1} for n in (16, 32, 64)]
    if kernel == "sum_factor_gradients":
        return [
            {"BLOCK_K": k, "BLOCK_N": n, "num_warps": 4, "num_stages": stages}
            for k in (16, 32, 64)
            for n in (32, 64)
            for stages in (2, 4)
        ]
    if kernel == "project":
        return [
            {"BLOCK_M": m, "BLOCK_K": wide, "num_warps": 4, "num_stages": stages}
            for m in (16, 32, 64)
            for stages in (3, 4, 5, 6)
        ]
    return [
        {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": 1}
        for m in (16, 32, 64)
        for n in (64, 128)
        for warps in (4, 8)
    ]


def examples() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls with the shapes of the ViTs; nothing is computed on the meta device."""
    for dtype in (torch.float32, torch.bfloat16):
        for rank in (4, 8, 12, 16, 32, 64, 96):
            yield f"ViT-B qkv, rank {rank}, {str(dtype)[6:]}", _example(dtype, 768, rank, 2)
        yield f"linear, rank 4, {str(dtype)[6:]}", _example(dtype, 1024, 4, 1)
        for rank in (3, 9, 17, 35, 70):
            yield f"odd sizes, rank {rank}, {str(dtype)[6:]}", _example(dtype, 77, rank, 2, rows=4095)
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
