"""Layer norms of ViT-B's tokens and of a decoder's map, against PyTorch's own with right gradients."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import rskernels
from benchmarks.measure import PASSES, Call, Case, batches, call_of, device
from rskernels.ops.layer_norm import layer_norm_reference

# rows, channels, dtype of x and of the result: tokens at 1024 pixels, under autocast at 512, a map at 1/4.
SHAPES = [
    (4096, 768, torch.float32, torch.float32),
    (4096, 768, torch.bfloat16, torch.bfloat16),
    (2048, 768, torch.float32, torch.bfloat16),
    (32768, 256, torch.bfloat16, torch.bfloat16),
]


def _build(rows: int, dim: int, dtype: torch.dtype, result: torch.dtype, which: str) -> dict[str, Call]:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*size, generator=generator).to(device(), dtype)

    x = random(rows, dim, dtype=dtype).requires_grad_()
    weight, bias = random(dim).requires_grad_(), random(dim).requires_grad_()
    grad = random(rows, dim, dtype=result)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return rskernels.layer_norm(x, weight, bias, dtype=result)

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return layer_norm_reference(x, weight, bias, 1e-6, result)

    forms = {"rskernels": ours, "F.layer_norm": eager, "torch.compile": torch.compile(eager)}
    return {name: call_of(which, form, (x, weight, bias), grad) for name, form in forms.items()}


def cases() -> list[Case]:
    shapes = [(batches() * rows, *rest) for rows, *rest in SHAPES]
    return [
        Case(
            name=f"{which}, {rows}x{dim}, {str(dtype)[6:]} to {str(result)[6:]}",
            build=partial(_build, rows, dim, dtype, result, which),
            dtype=result,
            reference="F.layer_norm",
        )
        for which in PASSES
        for rows, dim, dtype, result in shapes
    ]
