"""LoRA on q and v of a fused qkv projection, against the projection without LoRA and with merged weights.

"without LoRA" is what the targets refer to, a floor and not a peer: `rskernels.linear`, and its dx alone. It
computes less, so its own outputs are dropped and the reference's handed on. PEFT has no LoRA on two thirds of
a fused projection: there q, k and v are three.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import rskernels
from benchmarks.measure import PASSES, Call, Case, batches, call_of, device, dtypes, floor, lazily, on_gpu
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
        return (torch.randn(*size, generator=generator) * gain).to(device(), dtype)

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
    if on_gpu():
        calls["PEFT, q, k, v apart"] = lazily(
            partial(_through_peft, which, [x, weight, bias, *factors], grad)
        )
    plain = call_of(which, rskernels.linear, [x, weight, bias], grad)
    return calls | {"without LoRA": floor(plain, calls["eager"])}


def _through_peft(which: str, tensors: list[Tensor], grad: Tensor) -> Call:
    """peft's layers on the same numbers; the gradients are those of its own parameters."""
    import peft

    x, weight, bias, a_q, b_q, a_v, b_v = tensors
    dim, rank = weight.shape[1], a_q.shape[0]
    options = {"device": weight.device, "dtype": weight.dtype}
    layers = nn.ModuleDict({name: nn.Linear(dim, dim, **options) for name in "qkv"})
    for layer, rows, shift in zip(layers.values(), weight.chunk(3), bias.chunk(3), strict=True):
        layer.weight, layer.bias = nn.Parameter(rows), nn.Parameter(shift)
    config = peft.LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=["q", "v"], lora_dropout=0.0)
    peft.inject_adapter_in_model(config, layers)
    layers.requires_grad_(False)
    factors = []
    for name, a, b in (("q", a_q, b_q), ("v", a_v, b_v)):
        for part, factor in ((layers[name].lora_A, a), (layers[name].lora_B, b)):
            part["default"].weight = nn.Parameter(factor.detach())
            factors.append(part["default"].weight)

    def form(x: Tensor, *_: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in layers.values()], dim=-1)

    return call_of(which, form, [x, *factors], grad)


def _flops(shape: tuple[int, int, int, int], which: str) -> float:
    """The large product and the thin ones: xAᵀ and its update of y; g, dB, dA and g's part of dx."""
    batch, tokens, dim, rank = shape
    rows = batch * tokens
    forward = 2.0 * rows * dim * (3 * dim + 2 * 2 * rank)
    backward = 2.0 * rows * dim * (3 * dim + 4 * 2 * rank)
    return {"forward": forward, "backward": backward, "both": forward + backward}[which]


def cases() -> list[Case]:
    shapes = [(batches() * batch, *sizes) for batch, *sizes in SHAPES]
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
        for batch, tokens, dim, rank in shapes
        for dtype in dtypes()
    ]
