"""rel_pos_attention in Triton: the backward pass, in three kernels.

1. `query_gradients`, over query tiles: δ, dS, dQ, and the sums of dS over every key row and column.
2. `key_gradients`, over key tiles: dK, dV and, of padded tokens, their sums.
3. `table_gradients`: products of those sums of dS with q, a partial result for every share of the queries.

No atomics: every number has one writer, and sums are cut by shape alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rskernels.triton.launch import launch
from rskernels.triton.rel_pos_attention_tables import gradients_of_tables
from rskernels.triton.rel_pos_attention_tiles import (
    LOG2E,
    Call,
    add_biases,
    load_biases,
    load_keys,
    load_queries,
    load_table,
    place_of,
    query_biases,
    query_end,
    span_of,
    table_range,
    token_mask,
)


@triton.jit
def table_part(
    dq, table, sums, i, position, known, side, stride, top, bottom,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq + the sum over keys of sums[i, key] table[position_i - key + side - 1]; rows of the table
    from top to bottom are all that it touches."""
    for c0 in range(top, bottom, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        rows = load_table(table, c, side, DIM, BLOCK_D)
        key = position[:, None] + (side - 1) - c[None, :]
        mask = known[:, None] & (key.to(tl.uint32) < side)
        ds = tl.load(sums + i[:, None] * stride + key, mask=mask, other=0.0)
        dq = tl.dot(ds.to(rows.dtype), rows, dq, input_precision=PRECISION)
    return dq


@triton.jit
def p_and_dp(
    q, do, lse, k_ptr, v_ptr, k_pad, v_pad, rel, rel_w, r, known, y0, x0, first_row, first_column,
    row_stride, column_stride, H, W, h, w, tokens, span, scale,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    TABLES: tl.constexpr, PAD: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The key tile at (y0, x0): its k, and p and dp = dO·v of every query for it."""
    n = tl.arange(0, ROWS * COLS)
    key_y, key_x = y0 + n // COLS, x0 + n % COLS
    valid = (key_x < w) & (key_y * w + key_x < tokens)
    row, column = first_row + key_y, first_column + key_x
    seen = (row < H) & (column < W)
    k = load_keys(k_ptr, k_pad, row, column, row_stride, column_stride, valid, seen, DIM, BLOCK_D, PAD, WHOLE)
    v = load_keys(v_ptr, v_pad, row, column, row_stride, column_stride, valid, seen, DIM, BLOCK_D, PAD, WHOLE)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
    if TABLES:
        rel_h = tl.trans(load_biases(rel, r, y0 + tl.arange(0, ROWS), known, h, span))
        s = add_biases(s, rel_h - lse[:, None], rel_w, BLOCK_M, ROWS, COLS)
    else:
        s -= lse[:, None]
    p = tl.exp2(s)
    if not EVEN:
        p = tl.where(valid[None, :], p, 0.0)
    return k, p, tl.dot(do, tl.trans(v), input_precision=PRECISION)


@triton.jit
def query_gradients(
    q_ptr, k_ptr, v_ptr, k_pad, v_pad, table_h, table_w, rel_ptr, sums_ptr, do_ptr, out_ptr, lse_ptr,
    delta_ptr, dq_ptr,
    image_stride, row_stride, column_stride, do_image_stride, do_row_stride, do_column_stride,
    heads, down, across, H, W, h, w, tokens, plane, scale,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    BLOCK_C: tl.constexpr, TABLES: tl.constexpr, PAD: tl.constexpr, PADDED: tl.constexpr, EVEN: tl.constexpr,
    WHOLE: tl.constexpr, CUT: tl.constexpr, STORE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(tokens, BLOCK_M)
    unit = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * BLOCK_M
    image, head, first_row, first_column = place_of(unit, heads, down, across, h, w)
    end = query_end(first_row, H, w, tokens, PADDED)
    if PADDED:
        nothing = first >= end
        if nothing:
            return
    r = tl.arange(0, BLOCK_M)
    i = first + r
    y, x = i // w, i % w
    known = i < end
    row, column = first_row + y, first_column + x
    inside = known & (row < H) & (column < W)
    base = image * image_stride + head * DIM
    do_base = do_ptr + image * do_image_stride + head * DIM
    q = load_queries(q_ptr + base, row, column, row_stride, column_stride, inside, DIM, BLOCK_D)
    if TABLES:
        span = span_of(tokens)
        rel = rel_ptr + unit.to(tl.int64) * (h + w) * span + first
        sums = sums_ptr + (unit.to(tl.int64) * tokens + first) * (h + w)
        columns = query_biases(
            q, table_h, table_w, rel, r, y, x, known, h, w, span, DIM, BLOCK_D, BLOCK_C, PRECISION
        )
    else:
        rel, columns, span = None, None, None
    k_ptr, v_ptr = k_ptr + base, v_ptr + base
    if PAD:
        k_pad, v_pad = k_pad + head * DIM, v_pad + head * DIM

    do = load_queries(do_base, row, column, do_row_stride, do_column_stride, inside, DIM, BLOCK_D)
    mask = token_mask(inside, DIM, BLOCK_D)
    token = image * plane + row * W + column
    d = tl.arange(0, BLOCK_D)[None, :]
    out = tl.load(out_ptr + (token * heads + head)[:, None] * DIM + d, mask=mask, other=0.0)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    statistic = (image * heads + head) * plane + row * W + column
    # A padded query takes no part: p is 0.
    lse = tl.load(lse_ptr + statistic, mask=inside, other=float("inf"))
    rounded: tl.constexpr = q.dtype != tl.float32
    if PADDED and rounded:
        # Padded keys are all alike, and where most keys are, dp - δ is a small difference of large numbers,
        # of which a rounded `out` leaves little: there δ is a mean of the very dp that it is taken from.
        reaches_beyond = (first_row + h > H) | (first_column + w > W)
        if reaches_beyond:
            total, weighted = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
            for x0 in range(0, w, COLS):
                rel_w = None
                if TABLES:
                    rel_w = tl.trans(load_biases(columns, r, x0 + tl.arange(0, COLS), known, w, span))
                for y0 in range(0, h, ROWS):
                    k, p, dp = p_and_dp(
                        q, do, lse, k_ptr, v_ptr, k_pad, v_pad, rel, rel_w, r, known, y0, x0,
                        first_row, first_column, row_stride, column_stride, H, W, h, w, tokens, span, scale,
                        DIM, BLOCK_D, BLOCK_M, ROWS, COLS, TABLES, PAD, EVEN, WHOLE, PRECISION,
                    )  # fmt: skip
                    total += tl.sum(p, 1)
                    weighted += tl.sum(p * dp, 1)
            delta = weighted / tl.where(inside, total, 1.0)
    tl.store(delta_ptr + statistic, delta, mask=inside)

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for x0 in range(0, w, COLS):
        rel_w = None
        if TABLES:
            slice_x = x0 + tl.arange(0, COLS)
            rel_w = tl.trans(load_biases(columns, r, slice_x, known, w, span))
            sums_w = tl.zeros((BLOCK_M, COLS), tl.float32)
            if CUT:
                tl.debug_barrier()  # the sums over rows go on from those of the slice before
        for y0 in range(0, h, ROWS):
            k, p, dp = p_and_dp(
                q, do, lse, k_ptr, v_ptr, k_pad, v_pad, rel, rel_w, r, known, y0, x0,
                first_row, first_column, row_stride, column_stride, H, W, h, w, tokens, span, scale,
                DIM, BLOCK_D, BLOCK_M, ROWS, COLS, TABLES, PAD, EVEN, WHOLE, PRECISION,
            )  # fmt: skip
            ds = p * (dp - delta[:, None])
            if STORE:
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
            if TABLES:
                ds_grid = tl.reshape(ds, (BLOCK_M, ROWS, COLS))
                sums_w += tl.sum(ds_grid, 1)
                sums_h = tl.sum(ds_grid, 2)
                slice_y = y0 + tl.arange(0, ROWS)
                pointers = sums + r[:, None] * (h + w) + slice_y[None, :]
                wanted = known[:, None] & (slice_y < h)[None, :]
                if CUT:
                    sums_h += tl.load(pointers, mask=wanted & (x0 > 0), other=0.0)
                tl.store(pointers, sums_h, mask=wanted)
        if TABLES:
            pointers = sums + h + r[:, None] * (h + w) + slice_x[None, :]
            tl.store(pointers, sums_w, mask=known[:, None] & (slice_x < w)[None, :])

    if STORE:
        dq = dq * scale
        # Adds 0, which the compiler does not know: indices shared with what comes before the loop would hold
        # registers all through it.
        r = r + tl.program_id(1)
        i = first + r
        y, x = i // w, i % w
        known = i < end
        row, column = first_row + y, first_column + x
        if TABLES:
            tl.debug_barrier()
            top, bottom, left, right = table_range(y, x, h, w, known)
            dq = table_part(
                dq, table_h, sums, r, y, known, h, h + w, top, bottom, DIM, BLOCK_D, BLOCK_C, PRECISION
            )
            dq = table_part(
                dq, table_w, sums + h, r, x, known, w, h + w, left, right, DIM, BLOCK_D, BLOCK_C, PRECISION
            )
        token = image * plane + row * W + column
        pointers = dq_ptr + token[:, None] * (3 * heads * DIM) + head * DIM + d
        mask = token_mask(known & (row < H) & (column < W), DIM, BLOCK_D)
        tl.store(pointers, dq.to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit
def key_gradients(
    q_ptr, k_ptr, v_ptr, k_pad, v_pad, rel_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, padded_ptr,
    image_stride, row_stride, column_stride, do_image_stride, do_row_stride, do_column_stride,
    heads, down, across, H, W, h, w, tokens, plane, scale,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    TABLES: tl.constexpr, PAD: tl.constexpr, PADDED: tl.constexpr, WHOLE: tl.constexpr, STORE: tl.constexpr,
    STORE_PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    slices = tl.cdiv(w, COLS)
    tiles = tl.cdiv(h, ROWS) * slices
    unit = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    image, head, first_row, first_column = place_of(unit, heads, down, across, h, w)
    n = tl.arange(0, ROWS * COLS)
    y0, x0 = tile // slices * ROWS, tile % slices * COLS
    key_y, key_x = y0 + n // COLS, x0 + n % COLS
    valid = (key_x < w) & (key_y * w + key_x < tokens)
    key_row, key_column = first_row + key_y, first_column + key_x
    seen = (key_row < H) & (key_column < W)
    base = image * image_stride + head * DIM
    k = load_keys(
        k_ptr + base, k_pad + head * DIM if PAD else None, key_row, key_column, row_stride, column_stride,
        valid, seen, DIM, BLOCK_D, PAD,
    )  # fmt: skip
    v = load_keys(
        v_ptr + base, v_pad + head * DIM if PAD else None, key_row, key_column, row_stride, column_stride,
        valid, seen, DIM, BLOCK_D, PAD,
    )  # fmt: skip
    if TABLES:
        span = span_of(tokens)
        rel = rel_ptr + unit.to(tl.int64) * (h + w) * span
        columns = rel + tl.cast(h, tl.int64) * span
        slice_y, slice_x = y0 + tl.arange(0, ROWS), x0 + tl.arange(0, COLS)
    do_base = do_ptr + image * do_image_stride + head * DIM
    statistics = (image * heads + head) * plane

    dk = tl.zeros((ROWS * COLS, BLOCK_D), tl.float32)
    dv = tl.zeros((ROWS * COLS, BLOCK_D), tl.float32)
    end = query_end(first_row, H, w, tokens, PADDED)
    for i0 in range(0, end, BLOCK_M):
        i = i0 + tl.arange(0, BLOCK_M)
        row, column = first_row + i // w, first_column + i % w
        if WHOLE:
            known = tl.full((BLOCK_M,), True, tl.int1)
            inside = known
        else:
            known = i < end
            inside = known & (row < H) & (column < W)
        q = load_queries(q_ptr + base, row, column, row_stride, column_stride, inside, DIM, BLOCK_D, WHOLE)
        do = load_queries(do_base, row, column, do_row_stride, do_column_stride, inside, DIM, BLOCK_D, WHOLE)
        statistic = statistics + row * W + column
        # A padded query takes no part: its p is finite, its q, dO and δ are 0. (Were p made 0 by an lse of
        # infinity, every thread would find out again which of its queries are padded.)
        lse = tl.load(lse_ptr + statistic, mask=inside, other=0.0)
        delta = tl.load(delta_ptr + statistic, mask=inside, other=0.0)
        # Keys x queries, so that no operand of the sums below is transposed. What a key beyond the window
        # has in its row stays there, and is not stored.
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
        if TABLES:
            rel_h = load_biases(rel, i, slice_y, known, h, span)
            rel_w = load_biases(columns, i, slice_x, known, w, span)
            grid = tl.reshape(s, (ROWS, COLS, BLOCK_M)) + rel_w[None, :, :]
            s = tl.reshape(grid + (rel_h - lse[None, :])[:, None, :], (ROWS * COLS, BLOCK_M))
        else:
            s -= lse[None, :]
        p = tl.exp2(s)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

    dk = dk * scale
    d = tl.arange(0, BLOCK_D)
    if STORE:
        token = image * plane + key_row * W + key_column
        at = token[:, None] * (3 * heads * DIM) + head * DIM + d[None, :]
        mask = token_mask(valid & seen, DIM, BLOCK_D)
        tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=mask)
        tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=mask)
    if STORE_PADDED:
        padded = (valid & (seen == 0))[:, None]
        at = padded_ptr + tl.program_id(0).to(tl.int64) * (2 * DIM) + d
        tl.store(at, tl.sum(tl.where(padded, dk, 0.0), 0), mask=d < DIM)
        tl.store(at + DIM, tl.sum(tl.where(padded, dv, 0.0), 0), mask=d < DIM)


def backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    rel_pos_h: Tensor | None,
    rel_pos_w: Tensor | None,
    pad_qkv: Tensor | None,
    num_heads: int,
    window_size: int,
    scale: float,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv, both tables and pad_qkv; those that `mask` does not ask for are empty."""
    call = Call.of(qkv, rel_pos_h, rel_pos_w, pad_qkv, num_heads, window_size, scale)
    nothing = grad.new_empty(0)
    grad_qkv = qkv.new_empty(qkv.shape) if mask[0] else nothing
    delta, rel, sums = torch.empty_like(lse), call.biases(), call.sums()
    _query_gradients(call, grad, out, lse, delta, rel, sums, grad_qkv, mask[0])
    grad_h = grad_w = grad_pad = nothing
    if rel_pos_h is not None and rel_pos_w is not None and (mask[1] or mask[2]):
        grad_h, grad_w = gradients_of_tables(call, sums, mask[1], mask[2])
        grad_h = grad_h.to(rel_pos_h.dtype) if mask[1] else nothing
        grad_w = grad_w.to(rel_pos_w.dtype) if mask[2] else nothing
    wants_pad = mask[3] and pad_qkv is not None
    if mask[0] or wants_pad:
        padded = _key_gradients(call, grad, lse, delta, rel, grad_qkv, mask[0], wants_pad)
        if pad_qkv is not None and wants_pad:
            grad_pad = padded.to(pad_qkv.dtype)
    return grad_qkv, grad_h, grad_w, grad_pad


def _query_gradients(
    call: Call,
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    delta: Tensor,
    rel: Tensor | None,
    sums: Tensor | None,
    grad_qkv: Tensor,
    store: bool,
) -> None:
    """Writes delta, the biases, the sums of dS and, where asked to, the part of q in grad_qkv."""
    tile = call.tile("query_gradients")
    grad = tile.laid_out(grad)
    launch(
        query_gradients,
        (tile.query_tiles * call.units,),
        *call.parts(), *call.pads_of_keys(), call.rel_pos_h, call.rel_pos_w, rel, sums, grad,
        out.contiguous(), lse.contiguous(), delta, grad_qkv,
        *tile.strides(call.qkv), *tile.strides(grad), *tile.shape(), call.scale,
        **tile.constants(), **tile.query_constants(), CUT=tile.columns < tile.window[1], STORE=store,
    )  # fmt: skip


def _key_gradients(
    call: Call,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    rel: Tensor | None,
    grad_qkv: Tensor,
    store: bool,
    store_padded: bool,
) -> Tensor:
    """Writes the parts of k and v in grad_qkv; returns pad_qkv's gradient in float32, empty if unwanted."""
    tile = call.tile("key_gradients")
    grad = tile.laid_out(grad)
    windows = call.units // call.heads
    shape = (windows, call.heads, tile.key_tiles, 2, call.dim) if store_padded else (0,)
    padded = grad.new_empty(shape, dtype=torch.float32)
    dk, dv = grad_qkv.chunk(3, dim=3)[1:] if store else (grad_qkv, grad_qkv)
    launch(
        key_gradients,
        (tile.key_tiles * call.units,),
        *call.parts(), *call.pads_of_keys(), rel, grad, lse.contiguous(), delta, dk, dv, padded,
        *tile.strides(call.qkv), *tile.strides(grad), *tile.shape(), call.scale,
        **tile.constants(), WHOLE=tile.unpadded and call.tokens % tile.block_m == 0, STORE=store,
        STORE_PADDED=store_padded,
    )  # fmt: skip
    if not store_padded:
        return padded
    of_keys = padded.sum((0, 2)).transpose(0, 1).reshape(-1)
    # Padded queries are dropped: their part is 0.
    return torch.cat([of_keys.new_zeros(call.heads * call.dim), of_keys])
