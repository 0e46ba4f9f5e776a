"""The gradients of cross_attention in Triton. Shapes as in cross_attention_parts.

With p_ij = exp(scale q_i·k_j - top_i) factor_i, dp_ij = do_i·v_j and delta_i = Σ_j p_ij dp_ij = do_i·out_i:

    ds = p (dp - delta)    dq = scale ds k    dk = scale dsᵀ q    dv = pᵀ do

Two kernels, `_by_queries` (dq) and `_by_keys` (dk, dv), each of which writes the other's gradients too where
its tile is all there is: of the queries (Mask2Former's), or of the keys (SAM's tokens). Then every score is
computed once. Sums across programs are float32 parts, added up in order. Wide heads: `backward_wide`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rskernels.triton.cross_attention_parts import (
    LOG2_E,
    Gradient,
    aligned,
    attends,
    check,
    cut,
    load_statistics,
    load_tile,
    locate,
    pack,
    padded,
    powers,
    store_tile,
    strides,
    trimmed,
    weights_of_all,
)
from rskernels.triton.cross_attention_wide import WIDE, backward_wide
from rskernels.triton.launch import (
    cdiv,
    config,
    dot_precision,
    dtype_class,
    expect,
    launch,
    power_of_2,
)

# What one tile may hold, and the numbers in it: sums are as large, in registers.
FEW_KEYS, KEYS_TILE = 64, {"half": 4096, "float": 2048}
FEW_QUERIES, QUERIES_TILE = 128, {"half": 8192, "float": 2048}


@triton.jit
def _by_queries(
    grad, q, k, v, out, statistics, delta, bits, dq, dk, dv,
    batch, heads, queries, keys, parts, part, groups, scale, scale_log2,
    g_b, g_h, g_n, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, EVEN: tl.constexpr, FIRST: tl.constexpr,
    DQ: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries on one part of the keys: dq, and delta for `_by_keys`, or where the tile has all
    queries dk and dv."""
    tile, index, b, h = locate(tl.cdiv(queries, BLOCK_M), parts, heads)
    h64 = tl.cast(h, tl.int64)
    start = tile * BLOCK_M
    query = start + tl.arange(0, BLOCK_M)
    k += b * k_b + h64 * k_h
    v += b * v_b + h64 * v_h
    q_tile = load_tile(q + b * q_b + h64 * q_h, start, queries, q_n, 0, HEAD_DIM, BLOCK_M, BLOCK_D)
    do_tile = load_tile(grad + b * g_b + h64 * g_h, start, queries, g_n, 0, HEAD_DIM, BLOCK_M, BLOCK_D)
    out_tile = load_tile(out + b * o_b + h64 * o_h, start, queries, o_n, 0, HEAD_DIM, BLOCK_M, BLOCK_D)
    mean = tl.sum(do_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    row = (b * heads + h) * queries + query
    if delta is not None:
        tl.store(delta + row, mean, (query < queries) & (index == 0))
    top, factor = load_statistics(statistics, row, query < queries)
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # Without a gradient to write, delta is all there is to do.
    for n in range(index * part, tl.minimum(index * part + part, keys) if DQ or DK or DV else 0, BLOCK_N):
        key = n + tl.arange(0, BLOCK_N)[None, :]
        k_tile = load_tile(k, n, keys, k_n, 0, HEAD_DIM, BLOCK_N, BLOCK_D)
        product = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        p = powers(product, scale_log2, top[:, None]) * factor[:, None]
        if MASKED:
            p = tl.where(attends(bits, b, start, query[:, None], key, keys, groups, BLOCK_M), p, 0.0)
        elif not EVEN:
            p = tl.where(key < keys, p, 0.0)
        if DV:
            dv_tile = tl.dot(tl.trans(p.to(do_tile.dtype)), do_tile, input_precision=PRECISION)
            if FIRST > 0:
                dv_tile = tl.where(n + tl.arange(0, BLOCK_N)[:, None] < FIRST, 0.0, dv_tile)
            store_tile(dv, dv_tile, b, n, keys, h, heads, 0, HEAD_DIM, BLOCK_N, BLOCK_D)
        if DQ or DK:
            v_tile = load_tile(v, n, keys, v_n, 0, HEAD_DIM, BLOCK_N, BLOCK_D, FIRST)
            dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
            ds = (p * (dp - mean[:, None])).to(q_tile.dtype)
            if DQ:
                sums = tl.dot(ds, k_tile, sums, input_precision=PRECISION)
            if DK:
                dk_tile = tl.dot(tl.trans(ds), q_tile, input_precision=PRECISION) * scale
                store_tile(dk, dk_tile, b, n, keys, h, heads, 0, HEAD_DIM, BLOCK_N, BLOCK_D)
    if DQ:
        slot = index * batch + b
        store_tile(dq, sums * scale, slot, start, queries, h, heads, 0, HEAD_DIM, BLOCK_M, BLOCK_D)


@triton.jit
def _by_keys(
    grad, q, k, v, statistics, delta, bits, dq, dk, dv,
    batch, heads, queries, keys, parts, part, groups, scale, scale_log2,
    g_b, g_h, g_n, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, EVEN: tl.constexpr, FIRST: tl.constexpr, ALL_KEYS: tl.constexpr,
    DQ: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys and one part of the queries, scores keys × queries: dk and dv. ALL_KEYS: the tile has
    all keys, so the softmax and delta are its own, and dq can be written too."""
    tile, index, b, h = locate(tl.cdiv(keys, BLOCK_N), parts, heads)
    h64 = tl.cast(h, tl.int64)
    n = tile * BLOCK_N
    key = n + tl.arange(0, BLOCK_N)[:, None]
    grad += b * g_b + h64 * g_h
    q += b * q_b + h64 * q_h
    row = (b * heads + h) * queries
    k_tile = load_tile(k + b * k_b + h64 * k_h, n, keys, k_n, 0, HEAD_DIM, BLOCK_N, BLOCK_D)
    if DQ or DK:
        v_tile = load_tile(v + b * v_b + h64 * v_h, n, keys, v_n, 0, HEAD_DIM, BLOCK_N, BLOCK_D, FIRST)
    dk_sums = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_sums = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(index * part, tl.minimum(index * part + part, queries), BLOCK_M):
        query = start + tl.arange(0, BLOCK_M)
        q_tile = load_tile(q, start, queries, q_n, 0, HEAD_DIM, BLOCK_M, BLOCK_D)
        do_tile = load_tile(grad, start, queries, g_n, 0, HEAD_DIM, BLOCK_M, BLOCK_D)
        product = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
        if MASKED:  # noqa: SIM108  the interpreter and the compiler know it as a statement
            seen = attends(bits, b, start, query[None, :], key, keys, groups, BLOCK_M)
        else:
            seen = key < keys
        if ALL_KEYS:
            p = weights_of_all(product, scale_log2, seen, 0)
        else:
            top, factor = load_statistics(statistics, row + query, query < queries)
            p = powers(product, scale_log2, top[None, :]) * factor[None, :]
            if MASKED or not EVEN:
                p = tl.where(seen, p, 0.0)
        if DV:
            dv_sums = tl.dot(p.to(do_tile.dtype), do_tile, dv_sums, input_precision=PRECISION)
        if DQ or DK:
            dp = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION)
            if ALL_KEYS:  # noqa: SIM108
                mean = tl.sum(p * dp, 0)
            else:
                mean = tl.load(delta + row + query, query < queries, other=0.0)
            ds = (p * (dp - mean[None, :])).to(q_tile.dtype)
            if DK:
                dk_sums = tl.dot(ds, q_tile, dk_sums, input_precision=PRECISION)
            if DQ:
                dq_tile = tl.dot(tl.trans(ds), k_tile, input_precision=PRECISION) * scale
                store_tile(dq, dq_tile, b, start, queries, h, heads, 0, HEAD_DIM, BLOCK_M, BLOCK_D)
    slot = index * batch + b
    if DK:
        store_tile(dk, dk_sums * scale, slot, n, keys, h, heads, 0, HEAD_DIM, BLOCK_N, BLOCK_D)
    if DV:
        if FIRST > 0:
            dv_sums = tl.where(key < FIRST, 0.0, dv_sums)
        store_tile(dv, dv_sums, slot, n, keys, h, heads, 0, HEAD_DIM, BLOCK_N, BLOCK_D)


def backward(
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
    """dq, dk and dv, each in memory (B, N, h, d); empty tensors for those that are not wanted."""
    name = "cross_attention_backward"
    check(name, q, k, v, mask)
    expect(f"{name}: grad", grad, q.shape, q)
    expect(f"{name}: out", out, q.shape, q)
    expect(f"{name}: statistics", statistics, (*q.shape[:3], 2), q, torch.float32)
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    options = (mask, scale, drop_first_key_value, wanted)
    if dim % 16:
        inputs = (padded(grad), padded(q), padded(k), padded(v), padded(out))
        of_q, of_k, of_v = (trimmed(x, dim) for x in backward(*inputs, statistics, *options))
        return of_q, of_k, of_v
    grad, q, k, v, out = (aligned(x) for x in (grad, q, k, v, out))
    statistics = statistics.contiguous()
    if dim > WIDE[dtype_class(q.dtype)]:
        return backward_wide(grad, q, k, v, out, statistics, *options)
    wide = power_of_2(dim)
    kind = dtype_class(q.dtype)
    few_keys = keys <= FEW_KEYS and power_of_2(keys) * wide <= KEYS_TILE[kind]
    few_queries = (
        not few_keys and 0 < queries <= FEW_QUERIES and power_of_2(queries) * wide <= QUERIES_TILE[kind]
    )
    bits, groups = pack(mask)
    constants = {
        "HEAD_DIM": dim, "BLOCK_D": wide, "MASKED": mask is not None, "FIRST": int(drop_first_key_value),
        "PRECISION": dot_precision(q.dtype),
    }  # fmt: skip
    factors = (groups, scale, scale * LOG2_E)
    steps = (*strides(grad), *strides(q), *strides(k), *strides(v))
    dq, dk, dv = (Gradient(x, False, batch) for x in (q, k, v))
    shape_class = f"{kind}/d{wide}"
    delta = None
    if few_queries or (not few_keys and (wanted[0] or wanted[1])):
        few = ("/q16" if queries <= 16 else "/few") if few_queries else ""
        tuned = config("cross_attention.by_queries", shape_class + few, q.device)
        if few_queries:
            tuned["BLOCK_M"] = power_of_2(queries)
        tuned["BLOCK_N"] = min(tuned["BLOCK_N"], power_of_2(keys))
        programs = cdiv(queries, tuned["BLOCK_M"]) * batch * heads
        parts, part = cut(keys, queries, programs) if few_queries or wanted[0] else (1, keys)
        dq = Gradient(q, wanted[0], batch, parts)
        dk, dv = (
            Gradient(x, few_queries and asked, batch) for x, asked in zip((k, v), wanted[1:], strict=True)
        )
        if wanted[1] and not few_queries:
            delta = statistics.new_empty(batch, heads, queries)
        launch(
            _by_queries, (programs * parts,),
            grad, q, k, v, out, statistics, delta, bits, dq.buffer, dk.buffer, dv.buffer,
            batch, heads, queries, keys, parts, part, *factors, *steps, *strides(out),
            EVEN=keys % tuned["BLOCK_N"] == 0, DQ=dq.wanted, DK=dk.wanted, DV=dv.wanted, **constants, **tuned,
        )  # fmt: skip
        if few_queries:
            return dq.done(), dk.done(), dv.done()
    if few_keys or wanted[1] or wanted[2]:
        tuned = config("cross_attention.by_keys", shape_class + "/few" * few_keys, q.device)
        tuned["BLOCK_M"] = min(tuned["BLOCK_M"], power_of_2(queries))
        if few_keys:
            tuned["BLOCK_N"] = power_of_2(keys)
        programs = cdiv(keys, tuned["BLOCK_N"]) * batch * heads
        parts, part = cut(queries, keys, programs)
        if few_keys:
            dq = Gradient(q, wanted[0], batch)
        dk, dv = (Gradient(x, asked, batch, parts) for x, asked in zip((k, v), wanted[1:], strict=True))
        launch(
            _by_keys, (programs * parts,),
            grad, q, k, v, statistics, delta, bits, dq.buffer if few_keys else None, dk.buffer, dv.buffer,
            batch, heads, queries, keys, parts, part, *factors, *steps,
            EVEN=keys % tuned["BLOCK_N"] == 0, ALL_KEYS=few_keys,
            DQ=few_keys and wanted[0], DK=wanted[1], DV=wanted[2], **constants, **tuned,
        )  # fmt: skip
    return dq.done(), dk.done(), dv.done()
