"""cross_attention in Triton for head dims above 256 (Rein: one head as wide as the backbone, on 100 tokens).

The head dim is walked in chunks: nothing of its size is held. Shapes as in cross_attention_parts.

Backward writes p and ds of some keys at a time, no more numbers than q has: factors of k, q and do.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from rskernels.triton.cross_attention_parts import (
    LOG2_E,
    Gradient,
    attends,
    cut,
    delta_of,
    load_statistics,
    load_tile,
    locate,
    pack,
    powers,
    store_statistics,
    store_tile,
    strides,
    weights_of_all,
)
from rskernels.triton.launch import cdiv, config, dot_precision, dtype_class, launch, power_of_2

# Head dims above are wide: float32's three products a tile fill the registers.
WIDE = {"half": 256, "float": 128}
ONE_TILE = 128  # keys whose scores one tile holds


@triton.jit
def _products(
    q, k, start, n, queries, keys, q_n, k_n,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, FIRST: tl.constexpr = 0,
):  # fmt: skip
    """q kᵀ of a tile, summed over chunks of the head dim; keys before FIRST are zero."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for c in range(0, HEAD_DIM, BLOCK_D):
        q_tile = load_tile(q, start, queries, q_n, c, HEAD_DIM, BLOCK_M, BLOCK_D)
        k_tile = load_tile(k, n, keys, k_n, c, HEAD_DIM, BLOCK_N, BLOCK_D, FIRST)
        acc = tl.dot(q_tile, tl.trans(k_tile), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _forward_wide(
    q, k, v, bits, out, statistics, heads, queries, keys, columns, groups, scale,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ONE: tl.constexpr,
    MASKED: tl.constexpr, FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries. ONE: all keys are one tile, whose weights serve every chunk of BLOCK_V values.
    Otherwise the chunk is the program's own, and the scores are computed again for each."""
    tile, column, b, h = locate(tl.cdiv(queries, BLOCK_M), columns, heads)
    start = tile * BLOCK_M
    query = start + tl.arange(0, BLOCK_M)
    q += b * q_b + tl.cast(h, tl.int64) * q_h
    k += b * k_b + tl.cast(h, tl.int64) * k_h
    v += b * v_b + tl.cast(h, tl.int64) * v_h
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    weight = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for n in range(0, BLOCK_N if ONE else keys, BLOCK_N):
        key = n + tl.arange(0, BLOCK_N)[None, :]
        product = _products(
            q, k, start, n, queries, keys, q_n, k_n, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION
        )
        if MASKED:  # noqa: SIM108  as in cross_attention_backward
            seen = attends(bits, b, start, query[:, None], key, keys, groups, BLOCK_M)
        else:
            seen = key < keys
        new_top = tl.maximum(top, tl.max(tl.where(seen, product * scale, float("-inf")), 1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.where(seen, powers(product, scale, safe[:, None]), 0.0)
        shrink = tl.exp2(top - safe)
        weight = weight * shrink + tl.sum(p, 1)
        top = new_top
        if ONE:
            p = (p / weight[:, None]).to(v.dtype.element_ty)
            for c in range(0, HEAD_DIM, BLOCK_V):
                v_tile = load_tile(v, 0, keys, v_n, c, HEAD_DIM, BLOCK_N, BLOCK_V, FIRST)
                chunk = tl.dot(p, v_tile, input_precision=PRECISION)
                store_tile(out, chunk, b, start, queries, h, heads, c, HEAD_DIM, BLOCK_M, BLOCK_V)
        else:
            v_tile = load_tile(v, n, keys, v_n, column * BLOCK_V, HEAD_DIM, BLOCK_N, BLOCK_V, FIRST)
            sums = tl.dot(p.to(v_tile.dtype), v_tile, sums * shrink[:, None], input_precision=PRECISION)
    if not ONE:
        sums /= weight[:, None]
        store_tile(
            out, sums, b, start, queries, h, heads, column * BLOCK_V, HEAD_DIM, BLOCK_M, BLOCK_V
        )  # fmt: skip
    row = (b * heads + h) * queries + query
    store_statistics(statistics, row, top, 1 / weight, (query < queries) & (column == 0))


def forward_wide(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor, bits: Tensor | None, groups: int,
    scale: float, constants: dict[str, Any],
) -> None:  # fmt: skip
    """Write `out` (B, Q, h, d) and the statistics; `constants` are the kernel's."""
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    tuned = config("cross_attention.forward_wide", dtype_class(q.dtype), q.device)
    one = keys <= ONE_TILE
    tuned["BLOCK_M"] = min(tuned["BLOCK_M"], power_of_2(queries))
    if one:
        tuned["BLOCK_N"], tuned["BLOCK_V"] = power_of_2(keys), tuned["BLOCK_D"]
    columns = 1 if one else cdiv(dim, tuned["BLOCK_V"])
    launch(
        _forward_wide, (cdiv(queries, tuned["BLOCK_M"]) * columns * batch * heads,),
        q, k, v, bits, out, statistics, heads, queries, keys, columns, groups, scale * LOG2_E,
        *strides(q), *strides(k), *strides(v), ONE=one, **constants, **tuned,
    )  # fmt: skip


@triton.jit
def _weights_wide(
    grad, q, k, v, statistics, delta, bits, p_out, ds_out,
    heads, queries, keys, first, row_stride, tiles_n, groups, scale,
    g_b, g_h, g_n, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, FIRST: tl.constexpr, ALL_KEYS: tl.constexpr, P: tl.constexpr, DS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """p (0 for a dropped key) and ds of a tile of queries and of keys from first on, (B, h, Q, row_stride);
    zeros behind the last key, so that `_product` takes whole vectors, whose masks end at a multiple of 16."""
    tile, tile_n, b, h = locate(tl.cdiv(queries, BLOCK_M), tiles_n, heads)
    h64 = tl.cast(h, tl.int64)
    start, n = tile * BLOCK_M, first + tile_n * BLOCK_N
    query = start + tl.arange(0, BLOCK_M)
    key = n + tl.arange(0, BLOCK_N)[None, :]
    row = (b * heads + h) * queries + query
    product = _products(
        q + b * q_b + h64 * q_h, k + b * k_b + h64 * k_h, start, n, queries, keys, q_n, k_n,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
    if MASKED:  # noqa: SIM108
        seen = attends(bits, b, start, query[:, None], key, keys, groups, BLOCK_M)
    else:
        seen = key < keys
    if ALL_KEYS:
        p = weights_of_all(product, scale, seen, 1)
    else:
        top, factor = load_statistics(statistics, row, query < queries)
        p = tl.where(seen, powers(product, scale, top[:, None]) * factor[:, None], 0.0)
    at = row[:, None] * row_stride + (key - first)
    inside = (query < queries)[:, None] & (key - first < row_stride)
    if P:
        kept = tl.where(key >= FIRST, p, 0.0)
        tl.store(p_out + at, kept.to(p_out.dtype.element_ty), inside)
    if DS:
        dp = _products(
            grad + b * g_b + h64 * g_h, v + b * v_b + h64 * v_h, start, n, queries, keys, g_n, v_n,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION, FIRST,
        )  # fmt: skip
        if ALL_KEYS:  # noqa: SIM108
            mean = tl.sum(p * dp, 1)
        else:
            mean = tl.load(delta + row, query < queries, other=0.0)
        tl.store(ds_out + at, (p * (dp - mean[:, None])).to(ds_out.dtype.element_ty), inside)


@triton.jit
def _product(
    weights, x, out, batch, heads, rows, terms, parts, part, columns, first, total, scale,
    w_entry, w_stride, x_b, x_h, x_n,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    TRANSPOSED: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scale · weights (B, h, rows, terms) @ x (B, h, terms, d), a part of the terms, into rows first.. of
    `out` (parts · B, total, h, d). TRANSPOSED: weights lie as (terms, rows), and are loaded so: neighbours in
    memory sixteen bytes at once. ADD: to what `out` (float32) has."""
    tile, index, b, h = locate(tl.cdiv(rows, BLOCK_M) * columns, parts, heads)
    start, c = tile // columns * BLOCK_M, tile % columns * BLOCK_D
    row = start + tl.arange(0, BLOCK_M)
    weights += (b * heads + h) * w_entry
    x += b * x_b + tl.cast(h, tl.int64) * x_h
    slot = index * batch + b
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for n in range(index * part, tl.minimum(index * part + part, terms), BLOCK_K):
        term = n + tl.arange(0, BLOCK_K)
        if TRANSPOSED:
            at = weights + term.to(tl.int64)[:, None] * w_stride + row[None, :]
            w_tile = tl.trans(tl.load(at, (term < terms)[:, None] & (row < w_stride)[None, :], other=0.0))
        else:
            at = weights + row.to(tl.int64)[:, None] * w_stride + term[None, :]
            w_tile = tl.load(at, (row < rows)[:, None] & (term < w_stride)[None, :], other=0.0)
        x_tile = load_tile(x, n, terms, x_n, c, HEAD_DIM, BLOCK_K, BLOCK_D)
        acc = tl.dot(w_tile, x_tile, acc, input_precision=PRECISION)
    acc *= scale
    if ADD:
        before = out + (slot * total * heads + h) * HEAD_DIM
        acc += load_tile(before, first + start, total, heads * HEAD_DIM, c, HEAD_DIM, BLOCK_M, BLOCK_D)
    store_tile(out, acc, slot, first + start, total, h, heads, c, HEAD_DIM, BLOCK_M, BLOCK_D)


def backward_wide(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    statistics: Tensor,
    mask: Tensor | None,
    scale: float,
    drop_first_key_value: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """As `backward`."""
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    one = keys <= ONE_TILE
    width = keys if one else min(cdiv(keys, ONE_TILE), dim // ONE_TILE) * ONE_TILE  # keys at a time
    row_stride = cdiv(min(width, keys), 16) * 16  # so that rows are aligned
    with_ds = wanted[0] or wanted[1]
    p, ds = (
        q.new_empty(batch, heads, queries, row_stride) if needed else None for needed in (wanted[2], with_ds)
    )
    delta = delta_of(grad, out) if with_ds and not one else None
    bits, groups = pack(mask)
    kind, precision = dtype_class(q.dtype), dot_precision(q.dtype)
    tuned = config("cross_attention.weights_wide", kind, q.device)
    full, tuned["BLOCK_M"] = tuned["BLOCK_M"], min(tuned["BLOCK_M"], power_of_2(queries))
    # A warp's share of the tile stays: less of it, with as many loads in flight, takes more registers.
    tuned["num_warps"] = max(4, tuned["num_warps"] * tuned["BLOCK_M"] // full)
    if one:
        tuned["BLOCK_N"] = power_of_2(keys)
    shape = config("cross_attention.product", kind, q.device)
    columns = cdiv(dim, shape["BLOCK_D"])
    # A step reads no key that no tile wrote, and no program reaches into the next slab.
    assert one or (tuned["BLOCK_N"] % shape["BLOCK_K"] == 0 and ONE_TILE % shape["BLOCK_M"] == 0)

    def multiply(
        weights: Tensor, x: Tensor, into: Gradient, rows: int, first: int, cuts: tuple[int, int],
        factor: float, transposed: bool = True, add: bool = False,
    ) -> None:  # fmt: skip
        assert into.buffer is not None
        launch(
            _product, (cdiv(rows, shape["BLOCK_M"]) * columns * cuts[0] * batch * heads,),
            weights, x, into.buffer, batch, heads, rows, x.shape[2], *cuts, columns, first, into.of.shape[2],
            factor, queries * row_stride, row_stride, *strides(x),
            HEAD_DIM=dim, TRANSPOSED=transposed, ADD=add, PRECISION=precision, **shape,
        )  # fmt: skip

    tiles = cdiv(min(width, keys), shape["BLOCK_M"]) * columns * batch * heads
    cuts = cut(queries, min(width, keys), tiles)
    dq = Gradient(q, wanted[0], batch, float32=width < keys)
    dk, dv = (Gradient(x, asked, batch, cuts[0]) for x, asked in zip((k, v), wanted[1:], strict=True))
    for first in range(0, keys, width):
        last = min(first + width, keys)
        tiles_n = cdiv(last - first, tuned["BLOCK_N"])
        launch(
            _weights_wide, (cdiv(queries, tuned["BLOCK_M"]) * tiles_n * batch * heads,),
            grad, q, k, v, statistics, delta, bits, p, ds,
            heads, queries, keys, first, row_stride, tiles_n, groups, scale * LOG2_E,
            *strides(grad), *strides(q), *strides(k), *strides(v),
            HEAD_DIM=dim, MASKED=mask is not None, FIRST=int(drop_first_key_value), ALL_KEYS=one,
            P=p is not None, DS=ds is not None, PRECISION=precision, **tuned,
        )  # fmt: skip
        if ds is not None and dq.wanted:
            some_keys = k[:, :, first:last]
            cut_keys = (1, cdiv(last - first, shape["BLOCK_K"]) * shape["BLOCK_K"])
            multiply(ds, some_keys, dq, queries, 0, cut_keys, scale, transposed=False, add=first > 0)
        if ds is not None and dk.wanted:
            multiply(ds, q, dk, last - first, first, cuts, scale)
        if p is not None:
            multiply(p, grad, dv, last - first, first, cuts, 1.0)
    return dq.done(), dk.done(), dv.done()
