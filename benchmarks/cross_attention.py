"""Attention of one set to another, in the shapes of SAM's decoder, Mask2Former, Rein and the injector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

import rskernels
from benchmarks import attention_peers
from benchmarks.measure import PASSES, Call, Case, batches, call_of, device, dtypes, on_gpu, sized


@dataclass(frozen=True)
class Shape:
    """B batch, h heads, Q queries, M keys, d head dim; side: of the map a mask lies on, 0 without a mask."""

    name: str
    B: int
    h: int
    Q: int
    M: int
    d: int
    side: int = 0
    rein: bool = False  # keys and values of one token set, shared by the batch, the first value dropped


SHAPES = [
    Shape("SAM tokens on image, 7x4096", 1, 8, 7, 4096, 16),
    Shape("SAM image on tokens, 4096x7", 1, 8, 4096, 7, 16),
    Shape("SAM image on tokens, batch 4, 1024x9", 4, 8, 1024, 9, 16),
    Shape("SAM tokens on tokens, 9x9", 1, 8, 9, 9, 32),
    Shape("Mask2Former, 100x1024 masked", 2, 8, 100, 1024, 32, side=32),
    Shape("Mask2Former, 100x4096 masked", 2, 8, 100, 4096, 32, side=64),
    Shape("Mask2Former, 100x16384 masked", 2, 8, 100, 16384, 32, side=128),
    Shape("Rein, 1025x100, d 1024", 2, 1, 1025, 100, 1024, rein=True),
    Shape("injector, 1024x1024", 1, 8, 1024, 1024, 64),
]


@cache
def _boxes(shape: Shape) -> Tensor | None:
    """(B, Q, M): each query attends to a box of an eighth to half of the map's sides."""
    if not shape.side:
        return None
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(shape.B, shape.Q, shape.side, shape.side, dtype=torch.bool)
    for query in mask.flatten(0, 1):
        h, w = torch.randint(shape.side // 8, shape.side // 2 + 1, (2,), generator=generator).tolist()
        y, x = (int(torch.randint(shape.side - n + 1, (), generator=generator)) for n in (h, w))
        query[y : y + h, x : x + w] = True
    return mask.flatten(2)


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, drop_first: bool) -> Tensor:
    """In the dtype of q: what a model written out in PyTorch computes."""
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None], -torch.inf)
    weights = logits.softmax(-1)
    return weights[..., 1:] @ v[:, :, 1:] if drop_first else weights @ v


def _through(
    attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, drop_first: bool
) -> Tensor:
    """Attention as F.scaled_dot_product_attention has it, from any of those who do."""
    if drop_first:
        v = torch.cat([torch.zeros_like(v[:, :, :1]), v[:, :, 1:]], dim=2)
    B = q.shape[0]
    k, v = k.expand(B, -1, -1, -1), v.expand(B, -1, -1, -1)
    return attend(q, k, v, attn_mask=None if mask is None else mask[:, None])


def _build(shape: Shape, dtype: torch.dtype, which: str) -> dict[str, Call]:
    generator = torch.Generator().manual_seed(0)
    key_batch = 1 if shape.rein else shape.B

    def tokens(batch: int, count: int) -> Tensor:
        """(B, h, N, d) as a projection leaves it."""
        x = torch.randn(batch, count, shape.h * shape.d, generator=generator).to(device(), dtype)
        return x.unflatten(-1, (shape.h, shape.d)).transpose(1, 2)

    inputs = tokens(shape.B, shape.Q), tokens(key_batch, shape.M), tokens(key_batch, shape.M)
    mask, grad = _boxes(shape), tokens(shape.B, shape.Q)
    mask = None if mask is None else mask.to(device())

    def call(form: Callable[..., Tensor], contiguous: bool) -> Call:
        given = [
            (t.contiguous() if contiguous else t).detach().requires_grad_(which != "forward") for t in inputs
        ]
        return call_of(which, form, given, grad.contiguous() if contiguous else grad)

    ours = partial(rskernels.cross_attention, mask=mask, drop_first_key_value=shape.rein)
    eager = partial(_eager, mask=mask, drop_first=shape.rein)
    options = {"mask": mask, "drop_first": shape.rein}
    others: dict[str, Callable[..., Tensor]] = {"sdpa": F.scaled_dot_product_attention}
    if on_gpu():
        others |= attention_peers.sdpa(biased=mask is not None)
        others |= {"flex, compiled": attention_peers.flex_masked(), "xformers": attention_peers.xformers}
    return {
        "rskernels": call(ours, contiguous=False),
        "eager": call(eager, contiguous=True),
        "eager, compiled": call(torch.compile(eager), contiguous=True),
        **{name: call(partial(_through, form, **options), contiguous=True) for name, form in others.items()},
    }


def _flops(shape: Shape, which: str) -> float:
    """QKᵀ and PV; backward has five products of that size (one recomputed). Only of what is attended to: no
    more has to be computed."""
    mask = _boxes(shape)
    attended = 1.0 if mask is None else float(mask.float().mean())
    products = {"forward": 2, "backward": 5, "both": 7}[which]
    return 2.0 * shape.B * shape.h * shape.Q * shape.M * shape.d * attended * products


def _bytes(shape: Shape, which: str, dtype: torch.dtype) -> float:
    """Forward reads q, k, v and writes the output; backward reads them and its gradient and writes theirs."""
    queries = shape.B * shape.h * shape.Q * shape.d
    keys = (1 if shape.rein else shape.B) * shape.h * shape.M * shape.d
    mask = shape.B * shape.Q * shape.M if shape.side else 0
    forward = dtype.itemsize * (2 * queries + 2 * keys) + mask
    backward = dtype.itemsize * (3 * queries + 4 * keys) + mask
    return {"forward": forward, "backward": backward, "both": forward + backward}[which]


def cases() -> list[Case]:
    shapes = [replace(shape, B=batches() * shape.B) for shape in SHAPES]
    return [
        Case(
            name=f"{which}, {sized(shape.name)}, {str(dtype)[6:]}",
            build=partial(_build, shape, dtype, which),
            dtype=dtype,
            flops=_flops(shape, which),
            bytes=_bytes(shape, which, dtype),
        )
        for which in PASSES
        for shape in shapes
        for dtype in dtypes()
    ]
