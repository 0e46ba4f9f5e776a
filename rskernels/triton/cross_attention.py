"""cross_attention in Triton: forward, and what the ahead-of-time compiler and the tuner have to know.

    out_i = sum_j softmax_j(scale q_i·k_j + log mask_ij) v_j

A flash loop over tiles of keys with the softmax online. Few queries on many keys: parts of the keys are
programs of their own, and a second kernel puts their results together. Few keys are one tile. Wide heads are
cross_attention_wide. Shapes as in cross_attention_parts.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rskernels.triton.cross_attention_backward import backward
from rskernels.triton.cross_attention_parts import (
    LOG2_E,
    aligned,
    attends,
    check,
    cut,
    load_tile,
    locate,
    pack,
    padded,
    powers,
    store_statistics,
    store_tile,
    strides,
    trimmed,
)
from rskernels.triton.cross_attention_wide import WIDE, forward_wide
from rskernels.triton.launch import (
    cdiv,
    config,
    dot_precision,
    dtype_class,
    launch,
    power_of_2,
)

__all__ = ["backward", "candidates", "examples", "forward"]


@triton.jit
def _forward(
    q, k, v, bits, out, statistics, batch, heads, queries, keys, parts, part, groups, scale,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, EVEN: tl.constexpr, FIRST: tl.constexpr, PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries on one part of the keys. PARTIAL: out gets sums that are not divided yet, and
    statistics their denominators, for _combine."""
    tile, index, b, h = locate(tl.cdiv(queries, BLOCK_M), parts, heads)
    start = tile * BLOCK_M
    query = start + tl.arange(0, BLOCK_M)
    k += b * k_b + tl.cast(h, tl.int64) * k_h
    v += b * v_b + tl.cast(h, tl.int64) * v_h
    q_tile = load_tile(
        q + b * q_b + tl.cast(h, tl.int64) * q_h, start, queries, q_n, 0, HEAD_DIM, BLOCK_M, BLOCK_D
    )
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    weight = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for n in range(index * part, tl.minimum(index * part + part, keys), BLOCK_N):
        key = n + tl.arange(0, BLOCK_N)[None, :]
        k_tile = load_tile(k, n, keys, k_n, 0, HEAD_DIM, BLOCK_N, BLOCK_D)
        product = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        s = product * scale
        if MASKED:
            seen = attends(bits, b, start, query[:, None], key, keys, groups, BLOCK_M)
        elif not EVEN:
            seen = key < keys
        if MASKED or not EVEN:
            s = tl.where(seen, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        # -inf - -inf is NaN: a row that has met none of its keys yet.
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = powers(product, scale, safe[:, None])
        if MASKED or not EVEN:
            p = tl.where(seen, p, 0.0)
        shrink = tl.exp2(top - safe)
        weight = weight * shrink + tl.sum(p, 1)
        v_tile = load_tile(v, n, keys, v_n, 0, HEAD_DIM, BLOCK_N, BLOCK_D, FIRST)
        sums = tl.dot(p.to(v_tile.dtype), v_tile, sums * shrink[:, None], input_precision=PRECISION)
        top = new_top
    slot = index * batch + b
    if PARTIAL:
        factor = weight
    else:
        factor = 1 / weight
        sums *= factor[:, None]
    store_statistics(statistics, (slot * heads + h) * queries + query, top, factor, query < queries)
    store_tile(out, sums, slot, start, queries, h, heads, 0, HEAD_DIM, BLOCK_M, BLOCK_D)


@triton.jit
def _combine(
    sums, partial, out, statistics, batch, heads, queries, parts,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One query of one head: the sums of all parts, weighed by their maxima, in order."""
    row = tl.cast(tl.program_id(0), tl.int64)  # of (B, h, Q); partial: (parts, B, h, Q, 2)
    rows = tl.cast(batch, tl.int64) * heads * queries
    b, h, query = row // (heads * queries), row // queries % heads, row % queries
    at = ((b * queries + query) * heads + h) * HEAD_DIM
    c = tl.arange(0, BLOCK_D)
    top = tl.full((PARTS,), float("-inf"), tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        at_part = partial + 2 * (part * rows + row)
        top = tl.maximum(top, tl.load(at_part, part < parts, other=float("-inf")))
    highest = tl.max(top, 0)
    weight = tl.zeros((PARTS,), tl.float32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        at_part = partial + 2 * (part * rows + row)
        share = tl.exp2(tl.load(at_part, part < parts, other=float("-inf")) - highest)
        weight += share * tl.load(at_part + 1, part < parts, other=0.0)
        inside = (part < parts)[:, None] & (c < HEAD_DIM)[None, :]
        values = tl.load(sums + (part * rows * HEAD_DIM)[:, None] + at + c[None, :], inside, other=0.0)
        acc += tl.sum(share[:, None] * values, 0)
    factor = 1 / tl.sum(weight, 0)
    tl.store(out + at + c, (acc * factor).to(out.dtype.element_ty), c < HEAD_DIM)
    store_statistics(statistics, row, highest, factor, True)


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, drop_first_key_value: bool
) -> tuple[Tensor, Tensor]:
    """The output (B, h, Q, d), in memory (B, Q, h, d), and what backward has to know of every softmax,
    (B, h, Q, 2) float32: see `store_statistics`."""
    check("cross_attention_forward", q, k, v, mask)
    batch, heads, queries, dim = q.shape
    if dim % 16:
        out, statistics = forward(padded(q), padded(k), padded(v), mask, scale, drop_first_key_value)
        return trimmed(out, dim), statistics
    q, k, v = aligned(q), aligned(k), aligned(v)
    keys = k.shape[2]
    out = q.new_empty(batch, queries, heads, dim)
    statistics = q.new_empty(batch, heads, queries, 2, dtype=torch.float32)
    bits, groups = pack(mask)
    constants = {
        "HEAD_DIM": dim, "MASKED": mask is not None, "FIRST": int(drop_first_key_value),
        "PRECISION": dot_precision(q.dtype),
    }  # fmt: skip
    steps = (*strides(q), *strides(k), *strides(v))
    if dim > WIDE[dtype_class(q.dtype)]:
        forward_wide(q, k, v, out, statistics, bits, groups, scale, constants)
        return out.transpose(1, 2), statistics
    wide = power_of_2(dim)
    few = "/q16" if queries <= 16 else ""
    tuned = config("cross_attention.forward", f"{dtype_class(q.dtype)}/d{wide}{few}", q.device)
    tuned["BLOCK_M"] = min(tuned["BLOCK_M"], power_of_2(queries))
    tuned["BLOCK_N"] = min(tuned["BLOCK_N"], power_of_2(keys))
    programs = cdiv(queries, tuned["BLOCK_M"]) * batch * heads
    parts, part = cut(keys, queries, programs)
    results = (out, statistics)
    if parts > 1:
        results = (
            statistics.new_empty(parts, batch, queries, heads, dim),
            statistics.new_empty(parts, *statistics.shape),
        )
    launch(
        _forward, (programs * parts,),
        q, k, v, bits, *results, batch, heads, queries, keys, parts, part, groups, scale * LOG2_E, *steps,
        BLOCK_D=wide, EVEN=keys % tuned["BLOCK_N"] == 0, PARTIAL=parts > 1, **constants, **tuned,
    )  # fmt: skip
    if parts > 1:
        launch(
            _combine, (batch * heads * queries,), *results, out, statistics, batch, heads, queries, parts,
            HEAD_DIM=dim, BLOCK_D=wide, PARTS=8, num_warps=1,
        )  # fmt: skip
    return out.transpose(1, 2), statistics


def examples() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls of `forward` and `backward`, for every row of the configurations."""
    shapes = {
        "SAM, tokens on image": (1, 8, 7, 4096, 16),
        "SAM, image on tokens": (1, 8, 4096, 7, 16),
        "SAM, tokens on tokens": (1, 8, 9, 9, 32),
        "Mask2Former": (2, 8, 100, 4096, 32),
        "Rein, ViT-L": (2, 1, 1024, 100, 1024),
        "injector, 768": (1, 8, 1024, 1024, 96),
        "512 on 2048, d 512": (1, 2, 512, 2048, 512),
        **{f"1024 on 1024, d {d}": (1, 8, 1024, 1024, d) for d in (16, 32, 64, 128, 256)},
        **{f"7 on 4096, d {d}": (1, 8, 7, 4096, d) for d in (32, 64, 128, 256)},
        "100 on 4096, d 16": (2, 8, 100, 4096, 16),
        "100 on 4096, d 64": (2, 8, 100, 4096, 64),
        "64 on 4096, d 32": (2, 8, 64, 4096, 32),
        "32 on 4096, d 64": (2, 8, 32, 4096, 64),
        "64 on 4096, d 128": (2, 8, 64, 4096, 128),
        "32 on 4096, d 256": (2, 8, 32, 4096, 256),
        "4096 on 64, d 64": (1, 8, 4096, 64, 64),
        "4096 on 32, d 64": (1, 8, 4096, 32, 64),
        "4096 on 32, d 128": (1, 8, 4096, 32, 128),
        "4096 on 16, d 128": (1, 8, 4096, 16, 128),
        "4096 on 16, d 256": (1, 8, 4096, 16, 256),
        "1 on 1, d 1": (1, 1, 1, 1, 1),  # sizes of 1 are constants to the compiler
        "1 on 1, d 16": (1, 1, 1, 1, 16),
        **{f"1024 on 1024 masked, d {d}": (1, 8, 1024, 1024, d) for d in (16, 32, 64, 128, 256)},
        # Divided by no tile and not by 16.
        **{f"1021 on 1019 masked, d {d}": (1, 3, 1021, 1019, d) for d in (10, 20, 50, 100, 200)},
        "7 on 1019 masked, d 20": (1, 3, 7, 1019, 20),
        "33 on 1019 masked, d 50": (1, 3, 33, 1019, 50),
        "1021 on 33 masked, d 50": (1, 3, 1021, 33, 50),
        "1 on 1019 masked, d 50": (1, 3, 1, 1019, 50),
        "1 on 200, d 300": (1, 1, 1, 200, 300),
        "33 on 201 masked, d 300": (1, 3, 33, 201, 300),
    }

    def one(shape: tuple[int, ...], dtype: torch.dtype, masked: bool, rein: bool, step: bool) -> None:
        batch, heads, queries, keys, dim = shape

        def tokens(of: int, count: int) -> Tensor:
            return torch.empty(of, count, heads, dim, dtype=dtype).transpose(1, 2)

        q = tokens(batch, queries)
        k, v = (tokens(1 if rein else batch, keys) for _ in range(2))
        mask = torch.empty(batch, queries, keys, dtype=torch.bool) if masked else None
        options = (mask, dim**-0.5, rein)
        if step:
            statistics = torch.empty(batch, heads, queries, 2)
            backward(q, q, k, v, q, statistics, *options, [True] * 3)
        else:
            forward(q, k, v, *options)

    for (name, shape), dtype, step in product(shapes.items(), (torch.float32, torch.bfloat16), (False, True)):
        masked = "masked" in name or shape[2] in (32, 64, 100) or shape[4] == 512
        rein = name.startswith("Rein")
        title = f"{name}, {'fp32' if dtype == torch.float32 else 'bf16'}{', backward' if step else ''}"
        yield title, partial(one, shape, dtype, masked, rein, step)


def candidates(kernel: str, shape_class: str) -> list[dict[str, int]]:
    """What the tuner tries for a kernel of this operator; what does not fit a chip fails there.

    A side that one tile has whole is not in a configuration: the shape decides it.
    """
    name, half = kernel, shape_class.startswith("half")
    sides: tuple[tuple[int, ...], ...]
    if name == "product":
        sides = (
            ((64, 64, 128), (64, 64, 64), (128, 64, 64))
            if half
            else ((64, 32, 64), (32, 32, 64), (64, 32, 32))
        )
        names: tuple[str, ...] = ("BLOCK_M", "BLOCK_K", "BLOCK_D")
    elif name == "forward_wide":
        sides = (
            ((16, 64, 64, 256), (32, 64, 64, 256), (32, 64, 64, 128))
            if half
            else ((16, 64, 32, 128), (32, 64, 16, 64), (32, 64, 32, 64))
        )
        names = ("BLOCK_M", "BLOCK_N", "BLOCK_D", "BLOCK_V")
    elif name == "weights_wide":
        sides = (
            ((16, 64, 64), (32, 64, 64), (64, 128, 64))
            if half
            else ((16, 64, 32), (32, 64, 16), (32, 128, 32))
        )
        names = ("BLOCK_M", "BLOCK_N", "BLOCK_D")
    else:
        names = ("BLOCK_M", "BLOCK_N")
        _, channels, *tile = shape_class.split("/")
        if tile == ["few"] and name == "by_keys":
            names, sides = ("BLOCK_M",), ((32,), (64,), (128,)) if half else ((16,), (32,), (64,))
        elif tile and name == "by_queries":
            names, sides = ("BLOCK_N",), ((32,), (64,), (128,)) if half else ((16,), (32,), (64,))
        elif tile:
            sides = ((16, 32), (16, 64), (16, 128)) if half else ((16, 16), (16, 32), (16, 64))
        elif half:
            narrow = channels in ("d16", "d32", "d64")
            sides = ((64, 64), (128, 64), (128, 128)) if narrow else ((64, 32), (64, 64), (128, 64))
        else:
            # From 64 rows on the product is another instruction, which all kernels have or none: backward
            # rebuilds forward's logits to the last bit.
            rows, columns = {"d16": (64, 64), "d32": (64, 64), "d64": (32, 64)}.get(channels, (16, 32))
            sides = tuple((rows, count) for count in (columns // 4, columns // 2, columns) if count >= 16)
            if name == "by_keys":
                sides = tuple((queries, keys) for keys, queries in sides)
    few = shape_class.endswith(("/q16", "/few"))
    return [
        dict(zip((*names, "num_warps", "num_stages"), (*side, warps, stages), strict=True))
        for side in sides
        for warps in ((2, 4) if few else (4, 8))
        for stages in ((2, 3) if half else (1, 2))
    ]
