"""What the kernels of rel_pos_attention share: how a call is cut into tiles, and how tiles are loaded.

A *unit* is one head of one window (or of the grid). Programs take tiles of BLOCK_M consecutive queries of a
unit against tiles of ROWS x COLS keys, whole rows of the window padded to powers of 2: the bias of a tile is
one (BLOCK_M, ROWS) and one (BLOCK_M, COLS) tensor, and the second stays as it is from tile to tile. A row
wider than a tile is cut into slices of COLS.

`rel` is scratch of (units, h + w, span) floats: log2(e) times the biases of every query for all h key rows
and all w key columns. Neighbours in memory are queries (span: tokens, up to a multiple of 16), so that a
thread copies 16 bytes at once. The program that uses a query tile's biases writes them and reads them back:
a thread what other threads of its block wrote, which only the barrier between the two makes right. Logits are
in units of log2(e), so that exp2 serves.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rskernels.triton.launch import cdiv, config, dot_precision, dtype_class, expect, power_of_2

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def place_of(unit, heads, down, across, h, w):
    """Image, head, and first grid row and column of a unit. Heads run fastest: neighbours in memory."""
    window = unit // heads
    row = window // across  # of windows
    return (row // down).to(tl.int64), unit % heads, row % down * h, window % across * w


@triton.jit
def query_end(first_row, H, w, tokens, PADDED: tl.constexpr):
    """Where the queries of a unit end: after the last row inside the grid; nobody asks for those beyond."""
    end = tokens
    if PADDED:
        end = tl.minimum(tokens // w, H - first_row) * w
    return end


@triton.jit
def token_pointers(base, y, x, row_stride, column_stride, BLOCK_D: tl.constexpr):
    offsets = y.to(tl.int64) * row_stride + x.to(tl.int64) * column_stride
    return base + offsets[:, None] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def token_mask(inside, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    mask = inside[:, None]
    if DIM != BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D) < DIM)[None, :]
    return mask


@triton.jit
def load_tokens(pointers, inside, DIM: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr = False):
    """Zeros outside; WHOLE: all are inside."""
    if WHOLE and DIM == BLOCK_D:
        tokens = tl.load(pointers)
    else:
        tokens = tl.load(pointers, mask=token_mask(inside, DIM, BLOCK_D), other=0.0)
    return tokens


@triton.jit
def load_queries(
    base, y, x, row_stride, column_stride, inside,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr = False,
):  # fmt: skip
    pointers = token_pointers(base, y, x, row_stride, column_stride, BLOCK_D)
    return load_tokens(pointers, inside, DIM, BLOCK_D, WHOLE)


@triton.jit
def load_keys(
    base, pad, y, x, row_stride, column_stride, valid, inside,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAD: tl.constexpr, WHOLE: tl.constexpr = False,
):  # fmt: skip
    """Rows of k or v; what lies outside the grid is `pad`, or zeros without it."""
    pointers = token_pointers(base, y, x, row_stride, column_stride, BLOCK_D)
    if PAD:
        pointers = tl.where(inside[:, None], pointers, (pad + tl.arange(0, BLOCK_D))[None, :])
    else:
        valid &= inside
    return load_tokens(pointers, valid, DIM, BLOCK_D, WHOLE)


@triton.jit
def load_table(table, c, side, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    mask = token_mask(c < 2 * side - 1, DIM, BLOCK_D)
    return tl.load(table + c[:, None].to(tl.int64) * DIM + d[None, :], mask=mask, other=0.0)


@triton.jit
def table_range(y, x, h, w, known):
    """The first and last (exclusive) rows of both tables that queries at (y, x) touch; queries of several
    rows of the grid touch all of the columns' table."""
    top = tl.min(tl.where(known, y, h - 1), 0)
    bottom = tl.max(tl.where(known, y, 0), 0)
    one_row = top == bottom
    left = tl.where(one_row, tl.min(tl.where(known, x, w - 1), 0), 0)
    right = tl.where(one_row, tl.max(tl.where(known, x, 0), 0), w - 1)
    return top, bottom + h, left, right + w


@triton.jit
def span_of(tokens):
    """Tokens up to a multiple of 16, which the compiler then knows it to be."""
    return tl.cdiv(tokens, 16) * 16


@triton.jit
def write_biases(
    q, table, rel, i, position, known, side, span, first, last,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """rel[key, i] = log2(e) q_i·table[position_i - key + side - 1] for every key in [0, side)."""
    at = rel + ((position + (side - 1)).to(tl.int64) * span + i)[:, None]
    for c0 in range(first, last, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        rows = load_table(table, c, side, DIM, BLOCK_D)
        products = tl.dot(q, tl.trans(rows), input_precision=PRECISION) * LOG2E
        key = position[:, None] + (side - 1) - c[None, :]
        pointers = at - c.to(tl.int64)[None, :] * span
        tl.store(pointers, products, mask=known[:, None] & (key >= 0) & (key < side))


@triton.jit
def query_biases(
    q, table_h, table_w, rel, i, y, x, known, h, w, span,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Both, for the tile whose first query `rel` begins with; returns where its columns' begin."""
    top, bottom, left, right = table_range(y, x, h, w, known)
    columns = rel + tl.cast(h, tl.int64) * span
    write_biases(q, table_h, rel, i, y, known, h, span, top, bottom, DIM, BLOCK_D, BLOCK_C, PRECISION)
    write_biases(q, table_w, columns, i, x, known, w, span, left, right, DIM, BLOCK_D, BLOCK_C, PRECISION)
    tl.debug_barrier()
    return columns


@triton.jit
def load_biases(rel, i, key, known, side, span):
    """(keys, queries) of rel, whose row 0 is the one of key 0."""
    pointers = rel + key.to(tl.int64)[:, None] * span + i[None, :]
    return tl.load(pointers, mask=(key < side)[:, None] & known[None, :], other=0.0)


@triton.jit
def add_biases(s, rel_h, rel_w, BLOCK_M: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """s (queries, keys) + rel_h (queries, rows) + rel_w (queries, columns)."""
    grid = tl.reshape(s, (BLOCK_M, ROWS, COLS)) + rel_w[:, None, :] + rel_h[:, :, None]
    return tl.reshape(grid, (BLOCK_M, ROWS * COLS))


@dataclass(frozen=True)
class Call:
    """The arguments of a call, and what follows from their shapes."""

    qkv: Tensor
    rel_pos_h: Tensor | None
    rel_pos_w: Tensor | None
    pad_qkv: Tensor | None
    heads: int
    window: int
    scale: float

    @classmethod
    def of(
        cls,
        qkv: Tensor,
        rel_pos_h: Tensor | None,
        rel_pos_w: Tensor | None,
        pad_qkv: Tensor | None,
        num_heads: int,
        window_size: int,
        scale: float,
    ) -> Call:
        """Everything in qkv's dtype, with channels that are neighbours in memory."""
        channels = qkv.shape[3]
        sides = (window_size, window_size) if window_size else qkv.shape[1:3]
        for name, table, side in zip(("rel_pos_h", "rel_pos_w"), (rel_pos_h, rel_pos_w), sides, strict=True):
            if table is not None:
                shape = (2 * side - 1, channels // (3 * num_heads))
                expect(f"rel_pos_attention: {name}", table, shape, qkv, table.dtype)
        if (rel_pos_h is None) != (rel_pos_w is None):
            raise ValueError("rel_pos_attention: one of both tables is None; expected both or neither")
        if pad_qkv is not None:
            expect("rel_pos_attention: pad_qkv", pad_qkv, (channels,), qkv, pad_qkv.dtype)
        if qkv.stride(3) != 1:
            qkv = qkv.contiguous()
        table_h, table_w, pad = (
            t if t is None else t.to(qkv.dtype).contiguous() for t in (rel_pos_h, rel_pos_w, pad_qkv)
        )
        return cls(qkv, table_h, table_w, pad, num_heads, window_size, scale)

    @property
    def dim(self) -> int:
        return self.qkv.shape[3] // (3 * self.heads)

    @property
    def tables(self) -> bool:
        return self.rel_pos_h is not None

    @property
    def side(self) -> tuple[int, int]:
        """Rows and columns of a window."""
        return (self.window, self.window) if self.window else (self.qkv.shape[1], self.qkv.shape[2])

    @property
    def tokens(self) -> int:
        return self.side[0] * self.side[1]

    @property
    def units(self) -> int:
        B, H, W, _ = self.qkv.shape
        h, w = self.side
        return B * cdiv(H, h) * cdiv(W, w) * self.heads

    @cached_property
    def flat(self) -> bool:
        """Without tables the whole grid is a sequence of tokens at equal distances, cut anywhere."""
        return not self.tables and not self.window and _token_stride(self.qkv) is not None

    def parts(self) -> tuple[Tensor, ...]:
        """q, k and v."""
        return self.qkv.chunk(3, dim=3)

    def pads_of_keys(self) -> tuple[Tensor | None, ...]:
        """What a padded token's k and v are."""
        return (None, None) if self.pad_qkv is None else self.pad_qkv.chunk(3)[1:]

    def scratch(self, *shape: int) -> Tensor | None:
        """(units, *shape) floats, if there are tables."""
        return self.qkv.new_empty(self.units, *shape, dtype=torch.float32) if self.tables else None

    def biases(self) -> Tensor | None:
        """(units, h + w, span)."""
        return self.scratch(sum(self.side), cdiv(self.tokens, 16) * 16)

    def sums(self) -> Tensor | None:
        """(units, tokens, h + w), of dS."""
        return self.scratch(self.tokens, sum(self.side))

    def tile(self, kernel: str) -> Tile:
        """The configuration of `kernel`, no larger than the call: where 128 queries take 8 warps, the 49 of a
        window of 7 are a tile of 64, which takes 4."""
        found = config(f"rel_pos_attention.{kernel}", shape_class(self), self.qkv.device)
        block_m = min(found["BLOCK_M"], power_of_2(self.tokens))
        if self.flat:
            rows, columns = 1, min(found["BLOCK_N"], power_of_2(self.tokens))
        else:
            rows, columns = key_tile(*self.side, found["BLOCK_N"])
        # A warp's share of the tile's rows stays; in key_gradients the rows are the keys.
        side, full = (rows * columns, "BLOCK_N") if kernel == "key_gradients" else (block_m, "BLOCK_M")
        warps = max(1, min(found["num_warps"], found["num_warps"] * side // found[full]))
        return Tile(self, block_m, rows, columns, warps, found["num_stages"])


@dataclass(frozen=True)
class Tile:
    """How a kernel cuts a call, and its arguments that depend on it."""

    call: Call
    block_m: int
    rows: int
    columns: int
    num_warps: int
    num_stages: int

    @property
    def grid(self) -> tuple[int, int]:
        if self.call.flat:
            return cdiv(self.call.tokens, self.columns), self.columns
        return self.call.qkv.shape[1], self.call.qkv.shape[2]

    @property
    def window(self) -> tuple[int, int]:
        return self.grid if self.call.flat else self.call.side

    @property
    def keys(self) -> int:
        return self.rows * self.columns

    @property
    def query_tiles(self) -> int:
        return cdiv(self.call.tokens, self.block_m)

    @property
    def key_tiles(self) -> int:
        h, w = self.window
        return cdiv(h, self.rows) * cdiv(w, self.columns)

    def shape(self) -> tuple[int, ...]:
        """heads, windows down and across, grid and window sides, tokens of a window and of an image."""
        (H, W), (h, w) = self.grid, self.window
        _, rows, columns, _ = self.call.qkv.shape
        return self.call.heads, cdiv(H, h), cdiv(W, w), H, W, h, w, self.call.tokens, rows * columns

    def strides(self, x: Tensor) -> tuple[int, int, int]:
        """Of an image, a row and a column, in a tensor that `laid_out` gave."""
        if self.call.flat:
            stride = _token_stride(x)
            assert stride is not None
            return x.stride(0), self.columns * stride, stride
        return x.stride(0), x.stride(1), x.stride(2)

    def laid_out(self, x: Tensor) -> Tensor:
        """x as the kernels can read it."""
        if x.stride(3) != 1 or (self.call.flat and _token_stride(x) is None):
            return x.contiguous()
        return x

    def constants(self) -> dict[str, Any]:
        """The constexpr arguments that every kernel over tiles has, and the options of its launch."""
        call = self.call
        return {
            "DIM": call.dim,
            "BLOCK_D": power_of_2(call.dim),
            "BLOCK_M": self.block_m,
            "ROWS": self.rows,
            "COLS": self.columns,
            "TABLES": call.tables,
            "PAD": call.pad_qkv is not None,
            "PADDED": not self.unpadded,
            "PRECISION": dot_precision(call.qkv.dtype),
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }

    @property
    def unpadded(self) -> bool:
        """Does no window reach beyond the grid?"""
        (H, W), (h, w) = self.grid, self.window
        return H % h == 0 and W % w == 0

    def query_constants(self) -> dict[str, Any]:
        """Those of the kernels over query tiles: rows of a table that are taken at a time (three passes of a
        float32 product need more registers), and whether every key tile is full."""
        h, w = self.window
        even = h % self.rows == 0 and w % self.columns == 0 and h * w == self.call.tokens
        block_c = 16 if self.call.qkv.dtype == torch.float32 else 32
        return {"BLOCK_C": block_c, "EVEN": even, "WHOLE": even and self.unpadded}


def _token_stride(x: Tensor) -> int | None:
    """The distance of tokens (of a grid (B, H, W, C), row by row) in memory where it is always the same."""
    _, H, W, _ = x.shape
    if W == 1:
        return x.stride(1)
    return x.stride(2) if H == 1 or x.stride(1) == W * x.stride(2) else None


def shape_class(call: Call) -> str:
    """A head dim is served as the next of 32, 64, 128, 256. Windows take the grid's tiles, cut down."""
    return f"{dtype_class(call.qkv.dtype)}/d{power_of_2(call.dim, at_least=32)}"


def key_tile(h: int, w: int, block_n: int) -> tuple[int, int]:
    """Rows and columns of a tile of at most block_n keys: fewest tiles, then fewest slices of a row.

    64 keys of a window of 14: 4 x 16 cover it with 4 tiles of whole rows, 8 x 8 with 4 of two slices, 2 x 32
    with 7; so 4 x 16.
    """
    block_n = max(16, min(block_n, power_of_2(h, 1) * power_of_2(w, 1)))
    widths = [1 << bit for bit in range(block_n.bit_length())]

    def cost(columns: int) -> tuple[int, int]:
        slices = cdiv(w, columns)
        return slices * cdiv(h, block_n // columns), slices

    columns = min(widths, key=cost)
    return block_n // columns, columns
