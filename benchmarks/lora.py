"""LoRA on q and v of a fused qkv projection, against the projection without LoRA and with merged weights.

"without LoRA" is what the targets refer to, a floor and not a peer: `rskernels.linear`, and its dx alone. It
computes less, so its own outputs are dropped and the reference's handed on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import rskernels
from benchmarks.measure import PASSES, Call, Case, call_of
from rskernels.ops.lora import lora_qkv_reference

SCALE = 0.5
# (batch, tokens, D, rank): ViT-B at 1024 and 512 pixels, a small encoder.
SHAPES = [(1, 4096, 768, 4), (2, 1024, 768, 4), (1, 1024, 768, 16), (1, 1024, 128, 4)]


def _merged(
    x: Tensor, weight: Tensor, bias: Tensor, a_q: Tensor, b_q: Tensor, a_v: Tensor, b_v: Tensor
) -> Tensor:
    """One product with W + scale·BA, formed anew, as a training step has to."""
    dim = weight.shape[0] // 3
    update = torch.cat([b_q @ a_q, weight.new_zeros(dim, weight.shape[1]), b_v @ a_v])
    return rskernels.linear(x, torch.add(weight, update, alpha=SCALE), bias)


def _eager(*args: Tensor) -> Tensor:
    return lora_qkv_reference(*args, SCALE)


def _ours(*args: Tensor) -> Tensor:
    return rskernels.lora_qkv(*args, scale=SCALE)


def _build(shape: tuple[int, int, int, int], dtype: torch.dtype, which: str) -> dict[str, Call]:
    batch, tokens, dim, rank = shape
    generator = torch.Generator().manual_seed(0)

    def random(*size: int, gain: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator) * gain).to(dtype)

    x = random(batch, tokens, dim).requires_grad_()
    weight, bias = random(3 * dim, dim, gain=dim**-0.5), random(3 * dim)
    factors = [
        random(*size, gain=gain).requires_grad_()
        for size, gain in (((rank, dim), dim**-0.5), ((dim, rank), 0.1)) * 2
    ]
    grad = random(batch, tokens, 3 * dim)
    forms: dict[str, Callable[..., Tensor]] = {
        "rskernels": _ours,
        "eager": _eager,
        "merged, then linear": _merged,
        "compiled": torch.compile(_eager),
    }
    calls = {name: call_of(which, form, [x, weight, bias, *factors], grad) for name, form in forms.items()}
    plain = call_of(which, rskernels.linear, [x, weight, bias], grad)
    expected: list[Tensor | tuple[Tensor, ...]] = []

    def floor() -> Tensor | tuple[Tensor, ...]:
        if not expected:
            expected.append(calls["eager"]())
        plain()
        return expected[0]

    return calls | {"without LoRA": floor}


def _flops(shape: tuple[int, int, int, int], which: str) -> float:
    """The large product and the thin ones: xAᵀ and its update of y; g, dB, dA and g's part of dx."""
    batch, tokens, dim, rank = shape
    rows = batch * tokens
    forward = 2.0 * rows * dim * (3 * dim + 2 * 2 * rank)
    backward = 2.0 * rows * dim * (3 * dim + 4 * 2 * rank)
    return {"forward": forward, "backward": backward, "both": forward + backward}[which]


def cases() -> list[Case]:
    return [
        Case(
            name=f"{which}, {f'{batch}x' if batch > 1 else ''}{tokens}x{dim} -> {3 * dim}, rank {rank}, "
            f"{str(dtype)[6:]}",
            build=partial(_build, (batch, tokens, dim, rank), dtype, which),
            dtype=dtype,
            flops=_flops((batch, tokens, dim, rank), which),
            beside=("without LoRA",),
        )
        for which in PASSES
        for batch, tokens, dim, rank in SHAPES
        for dtype in (torch.float32, torch.bfloat16)
    ]
