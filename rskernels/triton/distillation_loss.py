"""distillation_loss on the GPU: both losses from one read of the maps, the gradient in one more pass.

Shapes: M distributions of N values: the pixels and their channels, or the rows of a map and their width. M is
up to three dimensions of the maps; neighbours in memory are joined to one. A tile is BLOCK_M x BLOCK_N values
of both maps.

docs/kernels/distillation_loss.md explains the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from rskernels.triton.distillation_loss_tiles import check, tile_of, walk_of
from rskernels.triton.launch import cdiv, launch

LOG2_E = math.log2(math.e)
ENOUGH_PROGRAMS = 96  # below, the values of a distribution are shared out among programs
TOTAL_BLOCK = 1024
MERGE_BLOCK = 128


@triton.jit
def _log_ratio(a, b):
    """ln(a / b), exact to float32's digits where a and b are close: the hardware's logarithm is not."""
    z = (a - b) / (a + b)
    z2 = z * z
    close = 2 * z * (1 + z2 * (1 / 3 + z2 * (1 / 5 + z2 * (1 / 7))))
    return tl.where(tl.abs(z) < 0.1, close, tl.log(a / b))


@triton.jit
def _divergence(top_s, sum_s, top_t, sum_t, weighted, per_temperature, STUDENT_FIRST: tl.constexpr):
    """Of one distribution, at no T²; and the mean of s - t under the first map's probabilities."""
    tops = top_s - top_t
    if STUDENT_FIRST:
        mean = weighted / sum_s
        return (mean - tops) * per_temperature - _log_ratio(sum_s, sum_t), mean
    mean = weighted / sum_t
    return (tops - mean) * per_temperature - _log_ratio(sum_t, sum_s), mean


@triton.jit
def _keep(
    stats, at, count, top_s, sum_s, top_t, sum_t, weighted, squares, mask, program_sums, per_temperature,
    STUDENT_FIRST: tl.constexpr,
):  # fmt: skip
    """Write what backward needs of some distributions, and their part of both losses."""
    kl, mean = _divergence(top_s, sum_s, top_t, sum_t, weighted, per_temperature, STUDENT_FIRST)
    tl.store(stats + at, top_s, mask=mask)
    tl.store(stats + count + at, 1 / sum_s, mask=mask)
    if STUDENT_FIRST:
        tl.store(stats + 2 * count + at, mean, mask=mask)
    else:
        tl.store(stats + 2 * count + at, top_t, mask=mask)
        tl.store(stats + 3 * count + at, 1 / sum_t, mask=mask)
    program = tl.program_id(0)
    tl.store(program_sums + program, tl.sum(tl.where(mask, kl, 0.0)))
    tl.store(program_sums + tl.num_programs(0) + program, tl.sum(tl.where(mask, squares, 0.0)))


@triton.jit
def forward_kernel(
    student, teacher, stats, sums, partial, d1, d2, values, count, part,
    s0, s1, sm, sn, t0, t1, tm, tn, r0, r1, rm, scale, per_temperature,
    STUDENT_FIRST: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Softmax sums of one tile of distributions, over `part` of their values, by running maxima.

    A map's value lies at i0·s0 + i1·s1 + m·sm + n·sn, m below d2 and n below `values`; its statistics at
    i0·r0 + i1·r1 + m·rm. SPLIT: the sums go to partial (parts, 6, count), for merge_kernel.
    """
    blocks = tl.cdiv(d2, BLOCK_M)
    outer = (tl.program_id(0) // blocks).to(tl.int64)
    i0, i1 = outer // d1, outer % d1
    m = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    m_wide = m.to(tl.int64)
    if WIDE:
        n = n.to(tl.int64)
    m_in = m < d2
    rows = m_wide if WIDE else m
    from_student = student + i0 * s0 + i1 * s1 + rows[:, None] * sm + n[None, :] * sn
    from_teacher = teacher + i0 * t0 + i1 * t1 + rows[:, None] * tm + n[None, :] * tn
    top_s = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    top_t = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    # Sums stay in the lanes until the end: a tile's only exchange between them is that of the maxima.
    sum_s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sum_t = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    weighted = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = tl.program_id(1) * part
    for start in tl.range(first, min(first + part, values), BLOCK_N, num_stages=STAGES):
        at = start.to(tl.int64) if WIDE else start
        n_in = ((start + n) < values)[None, :]
        inside = m_in[:, None] & n_in
        s = tl.load(from_student + at * sn, mask=inside, other=0.0).to(tl.float32)
        t = tl.load(from_teacher + at * tn, mask=inside, other=0.0).to(tl.float32)
        difference = s - t
        squares += difference * difference
        s = tl.where(n_in, s, float("-inf"))
        t = tl.where(n_in, t, float("-inf"))
        new_s, new_t = tl.maximum(top_s, tl.max(s, 1)), tl.maximum(top_t, tl.max(t, 1))
        shrink_s = tl.exp2((top_s - new_s) * scale)[:, None]
        shrink_t = tl.exp2((top_t - new_t) * scale)[:, None]
        e_s = tl.exp2((s - new_s[:, None]) * scale)
        e_t = tl.exp2((t - new_t[:, None]) * scale)
        sum_s = sum_s * shrink_s + e_s
        sum_t = sum_t * shrink_t + e_t
        if STUDENT_FIRST:
            weighted = weighted * shrink_s + e_s * difference
        else:
            weighted = weighted * shrink_t + e_t * difference
        top_s, top_t = new_s, new_t
    at = i0 * r0 + i1 * r1 + m_wide * rm
    all_s, all_t = tl.sum(sum_s, 1), tl.sum(sum_t, 1)
    all_weighted, all_squares = tl.sum(weighted, 1), tl.sum(squares, 1)
    if SPLIT:
        to = partial + tl.program_id(1).to(tl.int64) * 6 * count + at
        tl.store(to, top_s, mask=m_in)
        tl.store(to + count, all_s, mask=m_in)
        tl.store(to + 2 * count, top_t, mask=m_in)
        tl.store(to + 3 * count, all_t, mask=m_in)
        tl.store(to + 4 * count, all_weighted, mask=m_in)
        tl.store(to + 5 * count, all_squares, mask=m_in)
    else:
        _keep(
            stats, at, count, top_s, all_s, top_t, all_t, all_weighted, all_squares, m_in, sums,
            per_temperature, STUDENT_FIRST,
        )  # fmt: skip


@triton.jit
def merge_kernel(
    partial, stats, sums, count, parts, scale, per_temperature,
    STUDENT_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The parts of a distribution, in order, brought to one maximum."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    source = partial + at
    top_s = tl.load(source, mask=mask, other=0.0)
    sum_s = tl.load(source + count, mask=mask, other=1.0)
    top_t = tl.load(source + 2 * count, mask=mask, other=0.0)
    sum_t = tl.load(source + 3 * count, mask=mask, other=1.0)
    weighted = tl.load(source + 4 * count, mask=mask, other=0.0)
    squares = tl.load(source + 5 * count, mask=mask, other=0.0)
    for _ in range(1, parts):
        source += 6 * count
        part_s = tl.load(source, mask=mask, other=0.0)
        part_t = tl.load(source + 2 * count, mask=mask, other=0.0)
        new_s, new_t = tl.maximum(top_s, part_s), tl.maximum(top_t, part_t)
        old_s, old_t = tl.exp2((top_s - new_s) * scale), tl.exp2((top_t - new_t) * scale)
        add_s, add_t = tl.exp2((part_s - new_s) * scale), tl.exp2((part_t - new_t) * scale)
        sum_s = sum_s * old_s + add_s * tl.load(source + count, mask=mask, other=1.0)
        sum_t = sum_t * old_t + add_t * tl.load(source + 3 * count, mask=mask, other=1.0)
        part_weighted = tl.load(source + 4 * count, mask=mask, other=0.0)
        if STUDENT_FIRST:
            weighted = weighted * old_s + add_s * part_weighted
        else:
            weighted = weighted * old_t + add_t * part_weighted
        squares += tl.load(source + 5 * count, mask=mask, other=0.0)
        top_s, top_t = new_s, new_t
    _keep(
        stats, at, count, top_s, sum_s, top_t, sum_t, weighted, squares, mask, sums, per_temperature,
        STUDENT_FIRST,
    )  # fmt: skip


@triton.jit
def total_kernel(sums, kl, mse, programs, kl_factor, mse_factor, BLOCK: tl.constexpr):
    """Both losses from every program's sums, in float64 and in one order."""
    lanes = tl.arange(0, BLOCK)
    kl_sum = tl.zeros((BLOCK,), tl.float64)
    mse_sum = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, programs, BLOCK):
        mask = start + lanes < programs
        kl_sum += tl.load(sums + start + lanes, mask=mask, other=0.0)
        mse_sum += tl.load(sums + programs + start + lanes, mask=mask, other=0.0)
    tl.store(kl, tl.sum(kl_sum, 0).to(tl.float32) * kl_factor)
    tl.store(mse, tl.sum(mse_sum, 0).to(tl.float32) * mse_factor)


@triton.jit
def backward_kernel(
    grad_kl, grad_mse, student, teacher, stats, gradient, d1, d2, values, count,
    s0, s1, sm, sn, t0, t1, tm, tn, g0, g1, gm, gn, r0, r1, rm, scale, kl_factor, mse_factor,
    STUDENT_FIRST: tl.constexpr, HAS_KL: tl.constexpr, HAS_MSE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile, from the statistics that forward kept; places as in forward_kernel."""
    blocks = tl.cdiv(d2, BLOCK_M)
    n_blocks = tl.cdiv(values, BLOCK_N)
    outer = (tl.program_id(0) // (blocks * n_blocks)).to(tl.int64)
    tile = tl.program_id(0) % (blocks * n_blocks)
    i0, i1 = outer // d1, outer % d1
    m = (tile % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile // blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_in = m < d2
    inside = m_in[:, None] & (n < values)[None, :]
    m_wide = m.to(tl.int64)
    if WIDE:
        n = n.to(tl.int64)
    rows = m_wide if WIDE else m
    from_student = student + i0 * s0 + i1 * s1 + rows[:, None] * sm + n[None, :] * sn
    from_teacher = teacher + i0 * t0 + i1 * t1 + rows[:, None] * tm + n[None, :] * tn
    to = gradient + i0 * g0 + i1 * g1 + rows[:, None] * gm + n[None, :] * gn
    s = tl.load(from_student, mask=inside, other=0.0).to(tl.float32)
    t = tl.load(from_teacher, mask=inside, other=0.0).to(tl.float32)
    difference = s - t
    result = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if HAS_KL:
        at = stats + i0 * r0 + i1 * r1 + m_wide * rm
        top_s = tl.load(at, mask=m_in, other=0.0)
        inverse_s = tl.load(at + count, mask=m_in, other=0.0)
        third = tl.load(at + 2 * count, mask=m_in, other=0.0)
        p = tl.exp2((s - top_s[:, None]) * scale) * inverse_s[:, None]
        factor = tl.load(grad_kl).to(tl.float32) * kl_factor
        if STUDENT_FIRST:
            result = p * (difference - third[:, None]) * factor
        else:
            inverse_t = tl.load(at + 3 * count, mask=m_in, other=0.0)
            q = tl.exp2((t - third[:, None]) * scale) * inverse_t[:, None]
            result = (p - q) * factor
    if HAS_MSE:
        result += difference * (tl.load(grad_mse).to(tl.float32) * mse_factor)
    tl.store(to, result.to(gradient.dtype.element_ty), mask=inside)


def forward(
    student: Tensor, teacher: Tensor, axis: str, direction: str, temperature: float, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    """kl, mse and every distribution's statistics, as the operator distillation_loss_forward returns them."""
    check("distillation_loss_forward", student, teacher, axis, direction, temperature, reduction)
    walk = walk_of(axis, student, teacher)
    student_first = direction == "student||teacher"
    kl, mse = (student.new_empty((), dtype=torch.float32) for _ in range(2))
    stats = kl.new_empty(3 if student_first else 4, walk.count)
    constants = tile_of("forward_kernel", walk, student, 2)
    programs = walk.outer * cdiv(walk.sizes[2], constants["BLOCK_M"])
    tiles = cdiv(walk.values, constants["BLOCK_N"])
    # Cut by shape alone.
    part = cdiv(tiles, cdiv(ENOUGH_PROGRAMS, programs)) * constants["BLOCK_N"]
    parts = cdiv(walk.values, part)
    merges = cdiv(walk.count, MERGE_BLOCK)
    sums = kl.new_empty(2, programs if parts == 1 else merges)
    partial = None if parts == 1 else kl.new_empty(parts, 6, walk.count)
    scales = LOG2_E / temperature, 1 / temperature
    launch(
        forward_kernel, (programs, parts), student, teacher, stats, sums, partial,
        walk.sizes[1], walk.sizes[2], walk.values, walk.count, part,
        *walk.strides[0], walk.steps[0], *walk.strides[1], walk.steps[1], *walk.strides[2], *scales,
        STUDENT_FIRST=student_first, SPLIT=parts > 1, WIDE=walk.wide, **constants,
    )  # fmt: skip
    if partial is not None:
        launch(
            merge_kernel, (merges,), partial, stats, sums, walk.count, parts, *scales,
            STUDENT_FIRST=student_first, BLOCK=MERGE_BLOCK, num_warps=4,
        )  # fmt: skip
    count = student.shape[0] if reduction == "batchmean" else walk.count
    launch(
        total_kernel, (1,), sums, kl, mse, sums.shape[1], temperature**2 / count, 1 / student.numel(),
        BLOCK=TOTAL_BLOCK, num_warps=8,
    )  # fmt: skip
    return kl, mse, stats


def backward(
    grad_kl: Tensor | None,
    grad_mse: Tensor | None,
    student: Tensor,
    teacher: Tensor,
    stats: Tensor,
    axis: str,
    direction: str,
    temperature: float,
    reduction: str,
) -> Tensor:
    """The student's gradient, in its dtype and layout."""
    check("distillation_loss_backward", student, teacher, axis, direction, temperature, reduction)
    gradient = torch.empty_like(student)
    walk = walk_of(axis, student, teacher, gradient)
    student_first = direction == "student||teacher"
    expected = (3 if student_first else 4, walk.count)
    if stats.shape != expected or stats.dtype != torch.float32:
        raise ValueError(
            f"distillation_loss_backward: stats is {stats.dtype} of shape {tuple(stats.shape)}; "
            f"expected float32 of shape {expected}"
        )
    constants = tile_of("backward_kernel", walk, student, 3)
    tiles = cdiv(walk.sizes[2], constants["BLOCK_M"]) * cdiv(walk.values, constants["BLOCK_N"])
    count = student.shape[0] if reduction == "batchmean" else walk.count
    launch(
        backward_kernel, (walk.outer * tiles,),
        grad_kl, grad_mse, student, teacher, stats.contiguous(), gradient,
        walk.sizes[1], walk.sizes[2], walk.values, walk.count,
        *walk.strides[0], walk.steps[0], *walk.strides[1], walk.steps[1], *walk.strides[2], walk.steps[2],
        *walk.strides[3],
        LOG2_E / temperature, (1 if student_first else temperature) / count, 2 / student.numel(),
        STUDENT_FIRST=student_first, HAS_KL=grad_kl is not None, HAS_MSE=grad_mse is not None, WIDE=walk.wide,
        **constants,
    )  # fmt: skip
    return gradient


def candidates(kernel: str, shape_class: str) -> list[dict[str, int]]:
    """Configurations worth a trial on a chip: tiles of 2 to 16 KiB of either map."""
    kind = shape_class.rsplit("/", 1)[1]
    tiles = {
        "across": [(32, 64), (32, 128), (64, 64), (64, 128)],
        "along": [(8, 256), (16, 256), (8, 512), (4, 512)],
        "mixed": [(32, 32), (32, 64), (64, 32), (64, 64)],
    }[kind]
    if kernel == "backward_kernel":
        return [
            {"BLOCK_M": m, "BLOCK_N": n, "num_warps": w, "num_stages": 1} for m, n in tiles for w in (4, 8)
        ]
    warps = {"across": 16, "along": 4, "mixed": 4}[kind]
    return [
        {"BLOCK_M": m, "BLOCK_N": n, "STAGES": stages, "num_warps": w, "num_stages": stages}
        for m, n in tiles
        for w, stages in ((warps, 3), (8, 3), (8, 2))
    ]


def examples() -> Iterator[tuple[str, Callable[[], None]]]:
    """The maps of KTDA's recipes and the benchmark's: every shape class, both axes."""

    def call(
        shape: tuple[int, ...], layouts: tuple[bool, bool], axis: str, direction: str, dtype: torch.dtype
    ) -> None:
        maps = [
            torch.empty(
                shape, dtype=dtype, memory_format=torch.channels_last if last else torch.contiguous_format
            )
            for last in layouts
        ]
        options = (axis, direction, 1.0, "mean")
        kl, mse, stats = forward(maps[0], maps[1], *options)
        backward(kl, mse, maps[0], maps[1], stats, *options)

    paper, authors = ("channel", "student||teacher"), ("width", "teacher||student")
    maps: list[tuple[tuple[int, ...], tuple[bool, bool], tuple[str, str]]] = [
        ((4, 768, 32, 32), (False, False), paper),
        ((1, 768, 8, 32), (False, False), paper),
        ((4, 768, 32, 32), (True, True), paper),
        ((4, 768, 32, 32), (False, True), paper),
        ((4, 768, 32, 32), (False, False), authors),
        ((4, 1024, 14, 14), (True, True), authors),
        ((1, 1, 1, 1), (False, False), paper),  # sizes of 1 are constants to the compiler
    ]
    for dtype in (torch.float32, torch.bfloat16):
        for shape, layouts, options in maps:
            where = " and ".join("channels-last" if last else "contiguous" for last in sorted(set(layouts)))
            name = f"{'x'.join(map(str, shape))} {where} {options[0]} {str(dtype)[6:]}"
            yield name, partial(call, shape, layouts, *options, dtype)
