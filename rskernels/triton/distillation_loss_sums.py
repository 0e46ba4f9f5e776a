"""What distillation_loss's kernels do with a tile's sums."""

import triton
import triton.language as tl


@triton.jit
def _log_ratio(a, b):
    """ln(a / b), exact to float32's digits where a and b are close: the hardware's logarithm is not."""
    z = (a - b) / (a + b)
    z2 = z * z
    close = 2 * z * (1 + z2 * (1 / 3 + z2 * (1 / 5 + z2 * (1 / 7))))
    return tl.where(tl.abs(z) < 0.1, close, tl.log(a / b))


@triton.jit
def shifts(row_s, row_t, sn, tn, values, mask):
    """By what a distribution's maps differ, where that is more or less a constant, and its part in either
    map: (s - part) - (t - part) is exact where s - t would be rounded at the constant's size.

    It is the first s - t, cut to 8 bits, and taken from the larger map: that rounds nothing, so that nearly
    equal maps lose nothing either. 0 where the second s - t is another."""
    second = tl.minimum(values - 1, 1)
    s = tl.load(row_s, mask=mask, other=0.0).to(tl.float32)
    t = tl.load(row_t, mask=mask, other=0.0).to(tl.float32)
    next_s = tl.load(row_s + second * sn, mask=mask, other=0.0).to(tl.float32)
    next_t = tl.load(row_t + second * tn, mask=mask, other=0.0).to(tl.float32)
    shift, size_s, size_t = s - t, tl.abs(s), tl.abs(t)
    same = 4 * tl.abs((next_s - next_t) - shift) < tl.abs(shift)
    seen = 4096 * tl.abs(shift) > tl.maximum(size_s, size_t)
    shift = (shift.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    shift = tl.where(same & seen, shift, 0.0)
    of_s = tl.where(size_s > size_t, shift, 0.0)
    return shift, of_s, of_s - shift


@triton.jit
def _divergence(top_s, sum_s, top_t, sum_t, weighted, shift, per_temperature, STUDENT_FIRST: tl.constexpr):
    """Of one distribution, at no T²; and the mean of s - t - shift under the first map's probabilities."""
    of_s = tl.where(tl.abs(top_s) > tl.abs(top_t), shift, 0.0)
    tops = (top_s - of_s) - (top_t - (of_s - shift))
    if STUDENT_FIRST:
        mean = weighted / sum_s
        return (mean - tops) * per_temperature - _log_ratio(sum_s, sum_t), mean
    mean = weighted / sum_t
    return (tops - mean) * per_temperature - _log_ratio(sum_t, sum_s), mean


@triton.jit
def keep(
    stats, at, count, top_s, sum_s, top_t, sum_t, weighted, squares, shift, mask, program_sums,
    per_temperature, STUDENT_FIRST: tl.constexpr,
):  # fmt: skip
    """Write what backward needs of some distributions, and their part of both losses."""
    count = tl.cast(count, tl.int64)  # three of it pass 2^31
    kl, mean = _divergence(top_s, sum_s, top_t, sum_t, weighted, shift, per_temperature, STUDENT_FIRST)
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
def sum_groups(x):
    """(M, outer, lanes, inner) -> (M, lanes)."""
    return tl.sum(tl.sum(x, 3), 1)
