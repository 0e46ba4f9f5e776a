"""What forward and backward of cross_attention share: tiles, masks as bits, where long sums are cut.

Shapes: B batch, h heads, Q queries, M keys, d head dim. Tensors are read as (B, h, N, d) with any strides but
that of d; what is written lies as (B, N, h, d), sums of parts as (parts, B, N, h, d) in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from rskernels.triton.launch import cdiv, expect, launch, power_of_2, with_channels_together

LOG2_E = 1.4426950408889634
PROGRAMS = 256  # cuts are made until there are as many: two for each multiprocessor of the largest chip
CUT = 128  # keys or queries that a cut is a multiple of; so tiles are at most that long
WORD = 32  # queries whose mask bits make one number
CHUNK, COLUMNS = 512, 128  # keys of one program that packs a mask, and of one step of it


def cut(length: int, other: int, programs: int) -> tuple[int, int]:
    """Into how many parts a sum over `length` is cut, and their length, where `programs` sum without a cut.

    A part is at least twice as long as there are `other` rows: its partial sums are float32 and are written
    and read, which then costs less than reading the part. Where that leaves half of the chip idle, they may
    cost as much. Only the shape decides.
    """
    programs = max(programs, 1)
    least = 2 * other if programs * length >= PROGRAMS * other else other
    part = CUT * cdiv(max(cdiv(length, cdiv(PROGRAMS, programs)), least, 1), CUT)
    return max(cdiv(length, part), 1), part


def check(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    """What the public function has refused already; an exported graph calls the operator itself."""
    if q.dim() != 4 or k.dim() != 4 or k.shape[2] == 0:
        shapes = f"q has shape {tuple(q.shape)}, k {tuple(k.shape)}"
        raise ValueError(f"{name}: {shapes}; expected 4 dimensions and at least one key")
    batch, heads, queries, dim = q.shape
    for what, x in (("k", k), ("v", v)):  # one entry may serve the whole batch
        entries = 1 if x.shape[0] == 1 else batch
        expect(f"{name}: {what}", x, (entries, heads, k.shape[2], dim), q)
    if mask is not None:
        expect(f"{name}: mask", mask, (batch, queries, k.shape[2]), q, torch.bool)


def padded(x: Tensor) -> Tensor:
    """Zeros behind the channels, up to a multiple of 16: rows elsewhere are loaded number by number."""
    return pad(x, (0, -x.shape[-1] % 16))


def trimmed(x_bhnd: Tensor, dim: int) -> Tensor:
    """The first `dim` channels, in memory (B, N, h, dim)."""
    return x_bhnd.transpose(1, 2)[..., :dim].contiguous().transpose(1, 2)


def aligned(x: Tensor) -> Tensor:
    """x (d a multiple of 16) where whole vectors of it can be loaded, else a copy."""
    together = with_channels_together(x)
    in_place = x.data_ptr() % 16 == 0 and all(
        stride % 16 == 0 for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1
    )
    return together if in_place else together.clone(memory_format=torch.contiguous_format)


def strides(x_bhnd: Tensor) -> tuple[int, int, int]:
    """Of batch, head and token; a batch of one serves every entry."""
    batch, head, token, _ = x_bhnd.stride()
    return (0 if x_bhnd.shape[0] == 1 else batch), head, token


@triton.jit
def locate(tiles, parts, heads):
    """Which tile, part, batch entry (int64) and head the program has; tiles vary fastest."""
    program = tl.program_id(0)
    entry = program // (tiles * parts)
    return program % tiles, program // tiles % parts, tl.cast(entry // heads, tl.int64), entry % heads


@triton.jit
def load_tile(
    base, start, count, stride, first_channel, HEAD_DIM: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    FIRST: tl.constexpr = 0,
):  # fmt: skip
    """Rows start..start+N of the (count, HEAD_DIM) matrix at `base`, D channels from first_channel on, zero
    outside and in the rows before FIRST."""
    n, c = start + tl.arange(0, N)[:, None], first_channel + tl.arange(0, D)[None, :]
    inside = n < count
    if FIRST > 0:
        inside &= n >= FIRST
    if HEAD_DIM % D != 0:
        inside &= c < HEAD_DIM
    # 64 bits in the rows' pointers alone: a row may be more than 2^31 / N numbers from the next.
    return tl.load(base + tl.cast(n, tl.int64) * stride + c, inside, other=0.0)


@triton.jit
def store_tile(
    base, value, slot, start, count, head, heads, first_channel,
    HEAD_DIM: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """`value` into rows start..start+N of a head of entry `slot` of (slots, count, heads, HEAD_DIM)."""
    n, c = start + tl.arange(0, N)[:, None], first_channel + tl.arange(0, D)[None, :]
    base += (slot * count * heads + head) * HEAD_DIM
    at = base + tl.cast(n, tl.int64) * (heads * HEAD_DIM) + c
    tl.store(at, value.to(base.dtype.element_ty), (n < count) & (c < HEAD_DIM))


# ---------------------------------------------------------------- softmax


@triton.jit
def powers(product, scale, top):
    """2^(scale · product - top). Forward and backward multiply and subtract in one step, as written: left to
    the compiler, one of them might round the logit and the other not."""
    return tl.exp2(tl.fma(product, scale, -top))


@triton.jit
def weights_of_all(product, scale, seen, AXIS: tl.constexpr):
    """The weights of a tile that has all keys, along AXIS; zeros where it has none."""
    top = tl.max(tl.where(seen, product * scale, float("-inf")), AXIS, keep_dims=True)
    p = tl.where(seen, powers(product, scale, tl.where(top == float("-inf"), 0.0, top)), 0.0)
    weight = tl.sum(p, AXIS, keep_dims=True)
    return p * tl.where(weight == 0.0, 0.0, 1 / weight)


@triton.jit
def store_statistics(statistics, row, top, factor, inside):
    """Two numbers a query: the greatest log2 e · logit, and the factor of the powers of 2 relative to it.

    Apart, since a log-sum-exp of 100 is known to 4e-6 in float32, and so would be every weight.
    """
    tl.store(statistics + 2 * row, top, inside)
    tl.store(statistics + 2 * row + 1, factor, inside)


@triton.jit
def load_statistics(statistics, row, inside):
    """Of no query: zeros, so that its weights are zero."""
    top = tl.load(statistics + 2 * row, inside, other=0.0)
    return top, tl.load(statistics + 2 * row + 1, inside, other=0.0)


# ---------------------------------------------------------------- masks


@triton.jit
def _pack_mask(
    mask, bits, anywhere, queries, keys, groups, chunks, stride_b, stride_q, stride_k,
    CHUNK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    chunk, row = program % chunks, tl.cast(program // chunks, tl.int64)  # row: of (B, groups)
    group = row % groups
    bit = tl.arange(0, 32)
    query = group * 32 + bit  # 64 bits, as row is
    mask += (row // groups) * stride_b
    found = tl.zeros((32,), tl.int32)
    for start in range(0, CHUNK, COLUMNS):
        key = chunk * CHUNK + start + tl.arange(0, COLUMNS)
        inside = (query < queries)[:, None] & (key < keys)[None, :]
        at = query[:, None] * stride_q + tl.cast(key, tl.int64)[None, :] * stride_k
        attends = tl.load(mask + at, inside, other=0).to(tl.int32)
        tl.store(bits + row * keys + key, tl.sum(attends << bit[:, None], 0), key < keys)
        found = tl.maximum(found, tl.max(attends, 1))
    tl.store(anywhere + program, tl.sum(found << bit, 0))


@triton.jit
def _either(one, other):
    return one | other


@triton.jit
def _open_rows(bits, anywhere, keys, groups, chunks, CHUNK: tl.constexpr):
    """Set the bits of queries that attend nowhere."""
    program = tl.program_id(0)
    chunk, row = program % chunks, tl.cast(program // chunks, tl.int64)
    found = tl.zeros((32,), tl.int32)
    for first in range(0, chunks, 32):
        each = first + tl.arange(0, 32)
        found |= tl.load(anywhere + row * chunks + each, each < chunks, other=0)
    nowhere = ~tl.reduce(found, 0, _either)
    key = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = (key < keys) & (nowhere != 0)
    words = tl.load(bits + row * keys + key, inside, other=0)
    tl.store(bits + row * keys + key, words | nowhere, inside)


def pack(mask: Tensor | None) -> tuple[Tensor | None, int]:
    """mask (B, Q, M) → one bit per query and key, which is what every head reads; read once.

    Returns:
        bits: (B, groups, M) int32, bit i of group g is query 32 g + i; all of those of a query that attends
            nowhere, hence everywhere.
        groups.
    """
    if mask is None:
        return None, 0
    batch, queries, keys = mask.shape
    groups, chunks = cdiv(queries, WORD), cdiv(keys, CHUNK)
    bits = mask.new_empty(batch, groups, keys, dtype=torch.int32)
    anywhere = mask.new_empty(batch, groups, chunks, dtype=torch.int32)
    launch(
        _pack_mask, (batch * groups * chunks,),
        mask, bits, anywhere, queries, keys, groups, chunks, *mask.stride(),
        CHUNK=CHUNK, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    launch(
        _open_rows, (batch * groups * chunks,), bits, anywhere, keys, groups, chunks, CHUNK=CHUNK, num_warps=4
    )
    return bits, groups


@triton.jit
def attends(bits, b, start, query, key, keys, groups, N: tl.constexpr):
    """query: start..start+N, and key, with the result's two dimensions. False beyond the last key."""
    group = start // 32
    row = bits + (b * groups + group) * keys
    words = tl.load(row + key, key < keys, other=0)
    for more in tl.static_range(1, N // 32):
        next_words = tl.load(
            row + tl.cast(keys, tl.int64) * more + key, (key < keys) & (group + more < groups), other=0
        )
        words = tl.where(query // 32 == group + more, next_words, words)
    return (words & (1 << (query % 32))) != 0


# ---------------------------------------------------------------- backward's sums


@triton.jit
def _delta(
    grad, out, delta, heads, queries, g_b, g_h, g_n, o_b, o_h, o_n,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile, _, b, h = locate(tl.cdiv(queries, BLOCK_M), 1, heads)
    start = tile * BLOCK_M
    query = start + tl.arange(0, BLOCK_M)
    grad += b * g_b + tl.cast(h, tl.int64) * g_h
    out += b * o_b + tl.cast(h, tl.int64) * o_h
    total = tl.zeros((BLOCK_M,), tl.float32)
    for c in range(0, HEAD_DIM, BLOCK_D):
        do_tile = load_tile(grad, start, queries, g_n, c, HEAD_DIM, BLOCK_M, BLOCK_D)
        out_tile = load_tile(out, start, queries, o_n, c, HEAD_DIM, BLOCK_M, BLOCK_D)
        total += tl.sum(do_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    tl.store(delta + (b * heads + h) * queries + query, total, query < queries)


def delta_of(grad: Tensor, out: Tensor) -> Tensor:
    """do · out of every query, (B, h, Q) float32."""
    batch, heads, queries, dim = grad.shape
    delta = grad.new_empty(batch, heads, queries, dtype=torch.float32)
    launch(
        _delta, (cdiv(queries, 32) * batch * heads,),
        grad, out, delta, heads, queries, *strides(grad), *strides(out),
        HEAD_DIM=dim, BLOCK_M=32, BLOCK_D=min(64, power_of_2(dim)), num_warps=4,
    )  # fmt: skip
    return delta


@triton.jit
def _sum_parts(parts_ptr, out, parts, numbers, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        inside = (part < parts)[:, None] & (at < numbers)[None, :]
        values = tl.load(
            parts_ptr + tl.cast(part, tl.int64)[:, None] * numbers + at[None, :], inside, other=0.0
        )
        total += tl.sum(values, 0)
    tl.store(out + at, total.to(out.dtype.element_ty), at < numbers)


class Gradient:
    """The gradient of a (B or 1, h, N, d) tensor, written by a kernel as `parts` sums for every batch entry.

    `buffer` is what the kernel writes: the gradient itself, or float32 sums that `done` adds up, in order.
    float32: sums even if there is but one.
    """

    def __init__(
        self, of: Tensor, wanted: bool, batch: int, parts: int = 1, *, float32: bool = False
    ) -> None:
        self.of, self.wanted = of, wanted
        if not wanted:
            self.gradient = of.new_empty(0, 0, 0, 0)
            self.buffer: Tensor | None = None
            return
        shared, heads, tokens, dim = of.shape
        self.gradient = of.new_empty(shared, tokens, heads, dim)
        self.whole = parts == 1 and shared == batch and not float32
        self.buffer = (
            self.gradient
            if self.whole
            else of.new_empty(parts, batch, tokens, heads, dim, dtype=torch.float32)
        )

    def done(self) -> Tensor:
        """The gradient in the dtype of the tensor, (B or 1, h, N, d)."""
        if self.buffer is None:
            return self.gradient
        numbers = self.gradient.numel()
        if not self.whole and numbers:
            parts = self.buffer.numel() // numbers
            launch(
                _sum_parts, (cdiv(numbers, 128),), self.buffer, self.gradient, parts, numbers,
                PARTS=16, BLOCK=128, num_warps=4,
            )  # fmt: skip
        return self.gradient.transpose(1, 2)
