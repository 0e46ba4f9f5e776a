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

from rskernels.triton.distillation_loss_sums import keep, shifts, sum_groups
from rskernels.triton.distillation_loss_tiles import check, exactness, grouping, parts_of, tile_of, walk_of
from rskernels.triton.launch import cdiv, launch

LOG2_E = math.log2(math.e)
TOTAL_BLOCK = 1024
MERGE_BLOCK = 128
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit(do_not_specialize=["d1", "d2", "values", "count", "part"])
def forward_kernel(
    student, teacher, stats, sums, partial, d1, d2, values, count, part,
    s0, s1, sm, sn, t0, t1, tm, tn, r0, r1, rm, scale, per_temperature,
    STUDENT_FIRST: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr, SHIFT: tl.constexpr,
    ALIGN: tl.constexpr, ALIGN_M: tl.constexpr, ALIGN_N: tl.constexpr, OUTER: tl.constexpr,
    INNER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Softmax sums of one tile of distributions, over `part` of their values (full tiles), by running maxima.

    A map's value lies at i0·s0 + i1·s1 + m·sm + n·sn, m below d2 and n below `values`; its statistics at
    i0·r0 + i1·r1 + m·rm. SPLIT: the sums go to partial (parts, 7, count), for merge_kernel.
    ALIGN, ALIGN_M, ALIGN_N: of strides, d2 and values (Walk). OUTER and INNER: a tile's values n are
    (outer, lane, inner), those of a lane in one thread's registers.
    """
    LANES: tl.constexpr = BLOCK_N // (OUTER * INNER)
    SHAPE: tl.constexpr = (BLOCK_M, OUTER, LANES, INNER)
    d2, values = d2 // ALIGN_M * ALIGN_M, values // ALIGN_N * ALIGN_N
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
    m_s, m_t, n_s, n_t = rows * sm, rows * tm, n * sn, n * tn
    if ALIGN > 1 and ALIGN < 16:
        m_s, n_s = tl.multiple_of(m_s, ALIGN), tl.multiple_of(n_s, ALIGN)
        m_t, n_t = tl.multiple_of(m_t, ALIGN), tl.multiple_of(n_t, ALIGN)
    row_s = student + i0 * s0 + i1 * s1 + m_s
    row_t = teacher + i0 * t0 + i1 * t1 + m_t
    from_student = row_s[:, None] + n_s[None, :]
    from_teacher = row_t[:, None] + n_t[None, :]
    shift = tl.zeros((BLOCK_M,), tl.float32)
    if SHIFT:
        shift, shift_s, shift_t = shifts(row_s, row_t, sn, tn, values, m_in)
    # Tops and sums stay in the lanes until the end. A top begins with a finite number: -inf - -inf is NaN.
    top_s = tl.full((BLOCK_M, LANES), LOWEST, tl.float32)
    top_t = tl.full((BLOCK_M, LANES), LOWEST, tl.float32)
    sum_s = tl.zeros((BLOCK_M, LANES), tl.float32)
    sum_t = tl.zeros((BLOCK_M, LANES), tl.float32)
    weighted = tl.zeros((BLOCK_M, LANES), tl.float32)
    squares = tl.zeros((BLOCK_M, LANES), tl.float32)
    part = part // BLOCK_N * BLOCK_N
    first = tl.program_id(1) * part
    for start in tl.range(first, min(first + part, values), BLOCK_N, num_stages=STAGES):
        at = start.to(tl.int64) if WIDE else start
        at_s, at_t = at * sn, at * tn
        if ALIGN > 1 and ALIGN < 16:
            at_s, at_t = tl.multiple_of(at_s, ALIGN), tl.multiple_of(at_t, ALIGN)
        n_in = ((start + n) < values)[None, :]
        inside = m_in[:, None] & n_in
        s = tl.load(from_student + at_s, mask=inside, other=0.0).to(tl.float32)
        t = tl.load(from_teacher + at_t, mask=inside, other=0.0).to(tl.float32)
        difference = tl.reshape(s - t, SHAPE)
        squares += sum_groups(difference * difference)
        if SHIFT:
            difference = tl.reshape((s - shift_s[:, None]) - (t - shift_t[:, None]), SHAPE)
        s = tl.reshape(tl.where(n_in, s, float("-inf")), SHAPE)
        t = tl.reshape(tl.where(n_in, t, float("-inf")), SHAPE)
        new_s = tl.maximum(top_s, tl.max(tl.max(s, 3), 1))
        new_t = tl.maximum(top_t, tl.max(tl.max(t, 3), 1))
        shrink_s = tl.exp2((top_s - new_s) * scale)
        shrink_t = tl.exp2((top_t - new_t) * scale)
        e_s = tl.exp2((s - new_s[:, None, :, None]) * scale)
        e_t = tl.exp2((t - new_t[:, None, :, None]) * scale)
        sum_s = sum_s * shrink_s + sum_groups(e_s)
        sum_t = sum_t * shrink_t + sum_groups(e_t)
        if STUDENT_FIRST:
            weighted = weighted * shrink_s + sum_groups(e_s * difference)
        else:
            weighted = weighted * shrink_t + sum_groups(e_t * difference)
        top_s, top_t = new_s, new_t
    at = i0 * r0 + i1 * r1 + m_wide * rm
    all_s, all_t = tl.max(top_s, 1), tl.max(top_t, 1)
    shrink_s = tl.exp2((top_s - all_s[:, None]) * scale)
    shrink_t = tl.exp2((top_t - all_t[:, None]) * scale)
    weighted *= shrink_s if STUDENT_FIRST else shrink_t
    sum_s, sum_t = tl.sum(sum_s * shrink_s, 1), tl.sum(sum_t * shrink_t, 1)
    total, total_squares = tl.sum(weighted, 1), tl.sum(squares, 1)
    if SPLIT:
        to = partial + tl.program_id(1).to(tl.int64) * 7 * count + at
        tl.store(to, all_s, mask=m_in)
        tl.store(to + count, sum_s, mask=m_in)
        tl.store(to + 2 * count, all_t, mask=m_in)
        tl.store(to + 3 * count, sum_t, mask=m_in)
        tl.store(to + 4 * count, total, mask=m_in)
        tl.store(to + 5 * count, total_squares, mask=m_in)
        tl.store(to + 6 * count, shift, mask=m_in)
    else:
        keep(
            stats, at, count, all_s, sum_s, all_t, sum_t, total, total_squares, shift, m_in, sums,
            per_temperature, STUDENT_FIRST,
        )  # fmt: skip


@triton.jit(do_not_specialize=["count", "parts"])
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
    shift = tl.load(source + 6 * count, mask=mask, other=0.0)
    for _ in range(1, parts):
        source += 7 * count
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
    keep(
        stats, at, count, top_s, sum_s, top_t, sum_t, weighted, squares, shift, mask, sums,
        per_temperature, STUDENT_FIRST,
    )  # fmt: skip


@triton.jit(do_not_specialize=["programs"])
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


@triton.jit(do_not_specialize=["d1", "d2", "values", "count"])
def backward_kernel(
    grad_kl, grad_mse, student, teacher, stats, gradient, d1, d2, values, count,
    s0, s1, sm, sn, t0, t1, tm, tn, g0, g1, gm, gn, r0, r1, rm, scale, kl_factor, mse_factor,
    STUDENT_FIRST: tl.constexpr, HAS_KL: tl.constexpr, HAS_MSE: tl.constexpr, WIDE: tl.constexpr,
    SHIFT: tl.constexpr, ALIGN: tl.constexpr, ALIGN_M: tl.constexpr, ALIGN_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile, from the statistics that forward kept; places as in forward_kernel."""
    d2, values = d2 // ALIGN_M * ALIGN_M, values // ALIGN_N * ALIGN_N
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
    m_s, m_t, n_s, n_t = rows * sm, rows * tm, n * sn, n * tn
    m_g, n_g = rows * gm, n * gn
    if ALIGN > 1 and ALIGN < 16:
        m_s, n_s = tl.multiple_of(m_s, ALIGN), tl.multiple_of(n_s, ALIGN)
        m_t, n_t = tl.multiple_of(m_t, ALIGN), tl.multiple_of(n_t, ALIGN)
        m_g, n_g = tl.multiple_of(m_g, ALIGN), tl.multiple_of(n_g, ALIGN)
    row_s = student + i0 * s0 + i1 * s1 + m_s
    row_t = teacher + i0 * t0 + i1 * t1 + m_t
    from_student = row_s[:, None] + n_s[None, :]
    from_teacher = row_t[:, None] + n_t[None, :]
    to = gradient + i0 * g0 + i1 * g1 + m_g[:, None] + n_g[None, :]
    s = tl.load(from_student, mask=inside, other=0.0).to(tl.float32)
    t = tl.load(from_teacher, mask=inside, other=0.0).to(tl.float32)
    difference = s - t
    result = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if HAS_KL:
        count = tl.cast(count, tl.int64)  # three of it pass 2^31
        at = stats + i0 * r0 + i1 * r1 + m_wide * rm
        top_s = tl.load(at, mask=m_in, other=0.0)
        inverse_s = tl.load(at + count, mask=m_in, other=0.0)
        third = tl.load(at + 2 * count, mask=m_in, other=0.0)
        p = tl.exp2((s - top_s[:, None]) * scale) * inverse_s[:, None]
        factor = tl.load(grad_kl).to(tl.float32) * kl_factor
        if STUDENT_FIRST:
            if SHIFT:
                _, shift_s, shift_t = shifts(row_s, row_t, sn, tn, values, m_in)
                difference = (s - shift_s[:, None]) - (t - shift_t[:, None])
            result = p * (difference - third[:, None]) * factor
        else:
            inverse_t = tl.load(at + 3 * count, mask=m_in, other=0.0)
            q = tl.exp2((t - third[:, None]) * scale) * inverse_t[:, None]
            result = (p - q) * factor
    if HAS_MSE:
        result += (s - t) * (tl.load(grad_mse).to(tl.float32) * mse_factor)
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
    part = cdiv(tiles, parts_of(programs, tiles)) * constants["BLOCK_N"]
    parts = cdiv(walk.values, part)
    merges = cdiv(walk.count, MERGE_BLOCK)
    sums = kl.new_empty(2, programs if parts == 1 else merges)
    partial = None if parts == 1 else kl.new_empty(parts, 7, walk.count)
    scales = LOG2_E / temperature, 1 / temperature
    launch(
        forward_kernel, (programs, parts), student, teacher, stats, sums, partial,
        walk.sizes[1], walk.sizes[2], walk.values, walk.count, part,
        *walk.strides[0], walk.steps[0], *walk.strides[1], walk.steps[1], *walk.strides[2], *scales,
        STUDENT_FIRST=student_first, SPLIT=parts > 1, WIDE=walk.wide, **exactness(student, teacher),
        **walk.alignment(), **grouping(walk, constants, 8 * student.element_size()), **constants,
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
        **exactness(student, teacher), **walk.alignment(), **constants,
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
    return [
        {"BLOCK_M": m, "BLOCK_N": n, "STAGES": stages, "num_warps": w, "num_stages": stages}
        for m, n in tiles
        for w, stages in ((4, 3), (8, 3), (8, 2))
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
        ((4, 768, 14, 14), (False, False), paper),  # rows of no multiple of 16 bytes
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
