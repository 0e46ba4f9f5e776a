"""A projection of ViT-B's sizes, with bias and GELU, against PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import rskernels
from benchmarks.measure import Call, Case, batches, device, dtypes

# (tokens, in, out, activation): qkv, projection, the two halves of the MLP at 1024 pixels; qkv at 512.
SHAPES = [(4096, 768, 2304, None), (4096, 768, 768, None), (4096, 768, 3072, "gelu"), (4096, 3072, 768, None),
          (1024, 768, 2304, None)]  # fmt: skip


def _torch_linear(x: Tensor, weight: Tensor, bias: Tensor, activation: str | None) -> Tensor:
    y = F.linear(x, weight, bias)
    return F.gelu(y) if activation else y


def _build(shape: tuple[int, int, int, str | None], dtype: torch.dtype, train: bool) -> dict[str, Call]:
    tokens, d_in, d_out, activation = shape
    generator = torch.Generator().manual_seed(0)

    def random(*size: int, gain: float = 1.0) -> Tensor:
        values = torch.randn(*size, generator=generator) * gain
        return values.to(device(), dtype).requires_grad_(train)

    x, weight, bias = random(tokens, d_in), random(d_out, d_in, gain=d_in**-0.5), random(d_out)
    grad = torch.randn(tokens, d_out, generator=generator).to(device(), dtype)

    def forward(form: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad():
            return form(x, weight, bias, activation)

    def step(form: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(form(x, weight, bias, activation), (x, weight, bias), grad)

    call = step if train else forward
    return {"rskernels": partial(call, rskernels.linear), "F.linear": partial(call, _torch_linear)}


def cases() -> list[Case]:
    shapes = [(batches() * tokens, *sizes) for tokens, *sizes in SHAPES]
    return [
        Case(
            name=f"{'training step' if train else 'forward'}, {tokens}x{d_in} -> {d_out}"
            f"{' + ' + activation if activation else ''}, {str(dtype)[6:]}",
            build=partial(_build, (tokens, d_in, d_out, activation), dtype, train),
            dtype=dtype,
            flops=2.0 * tokens * d_in * d_out * (3 if train else 1),
            reference="F.linear",
        )
        for train in (False, True)
        for tokens, d_in, d_out, activation in shapes
        for dtype in dtypes()
    ]
