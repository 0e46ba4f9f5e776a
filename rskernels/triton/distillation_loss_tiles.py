"""How distillation_loss's kernels walk over maps of any layout, and in which tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rskernels.library import TRITON_DTYPES
from rskernels.triton.launch import cdiv, config, dtype_class, power_of_2

PROCESSORS = 132
AT_ONCE = 2  # programs that a processor needs to hide its memory's latency
# What a program's first loads take, and the kernel that merges parts, in tiles.
START, MERGE = 1, 4


@dataclass(frozen=True)
class Walk:
    """The maps' distributions in the order of the student's memory."""

    sizes: tuple[int, int, int]  # of M: two outer dimensions and the inner one
    strides: tuple[tuple[int, int, int], ...]  # of every map, and last of a row of the statistics
    values: int
    steps: tuple[int, ...]  # between a distribution's values, of every map
    count: int
    wide: bool  # some offset passes 2^31
    # What the strides but those of 1 are multiples of, and the sizes along which maps have a stride of 1: up
    # to 16, which is as much as the compiler asks about.
    align: int
    align_sizes: tuple[int, int]

    @property
    def outer(self) -> int:
        return self.sizes[0] * self.sizes[1]

    def alignment(self) -> dict[str, int]:
        """The kernels' constants of it."""
        return {"ALIGN": self.align, "ALIGN_M": self.align_sizes[0], "ALIGN_N": self.align_sizes[1]}

    def kind(self, maps: int) -> str:
        """Of a tile of the first `maps` maps: what lies beside each other in memory?"""
        along = all(step == 1 for step in self.steps[:maps])
        across = all(strides[2] == 1 for strides in self.strides[:maps])
        return "along" if along else "across" if across else "mixed"


def walk_of(axis: str, *maps: Tensor) -> Walk:
    shape, dim = maps[0].shape, 1 if axis == "channel" else 3
    outer = [d for d in range(4) if d != dim]
    row = [math.prod(shape[e] for e in outer if e > d) for d in outer]
    strides = [[m.stride(d) for d in outer] for m in maps] + [row]
    # size and strides of each dimension, the one of nearest neighbours last; then joined where all agree.
    order = sorted((i for i in range(3) if shape[outer[i]] > 1), key=lambda i: (-strides[0][i], i))
    joined: list[tuple[int, tuple[int, ...]]] = []
    for i in order:
        size, steps = shape[outer[i]], tuple(s[i] for s in strides)
        if joined and all(a == size * b for a, b in zip(joined[-1][1], steps, strict=True)):
            size *= joined.pop()[0]
        joined.append((size, steps))
    # A stride of 0 where there is no dimension leaves the others' alignment to be seen.
    joined = [(1, (0,) * len(strides))] * (3 - len(joined)) + joined
    spans = [sum((shape[d] - 1) * m.stride(d) for d in range(4)) for m in maps]
    a, b, c = joined
    steps = tuple(m.stride(dim) for m in maps)
    apart = [step for step in (*c[1][:-1], *steps) if step != 1]
    align = math.gcd(16, *apart, *a[1][:-1], *b[1][:-1])
    align_sizes = (
        math.gcd(16, c[0]) if 1 in c[1][:-1] else 1,
        math.gcd(16, shape[dim]) if 1 in steps else 1,
    )
    return Walk(
        (a[0], b[0], c[0]),
        tuple(zip(a[1], b[1], c[1], strict=True)),
        shape[dim],
        steps,
        math.prod(shape[d] for d in outer),
        max(spans) >= 2**31,
        align,
        align_sizes,
    )


def parts_of(programs: int, tiles: int) -> int:
    """In how many parts the values of a distribution are shared out, so that the busiest processor has least
    to do. By shape alone: every chip cuts as for PROCESSORS."""

    def work(parts: int) -> int:
        busiest = max(cdiv(programs * parts, PROCESSORS), AT_ONCE)
        return busiest * (cdiv(tiles, parts) + START) + MERGE * (parts > 1)

    return min(range(1, tiles + 1), key=work)


def grouping(walk: Walk, constants: dict[str, int], bits: int) -> dict[str, int]:
    """OUTER and INNER of a tile: a distribution's values in it are (outer, lane, inner), and a thread has
    those of its lanes, as the compiler deals out a tile to be read in up to 16 bytes at once. Where it does
    otherwise, threads exchange values on the way, nothing else."""
    m, n, threads = constants["BLOCK_M"], constants["BLOCK_N"], 32 * constants["num_warps"]
    longest = max(1, min(128 // bits, walk.align, m * n // threads))
    kind = walk.kind(2)
    if kind == "along":
        inner = min(longest, n, walk.align_sizes[1])
        return {"OUTER": max(1, n // inner // threads), "INNER": inner}
    if kind == "across":
        vector = min(longest, m, walk.align_sizes[0])
        return {"OUTER": max(1, n // max(1, threads // (m // vector))), "INNER": 1}
    return {"OUTER": 1, "INNER": 1}  # a thread's values of one map are not those of the other


def tile_of(kernel: str, walk: Walk, student: Tensor, maps: int) -> dict[str, int]:
    """The kernel's constants: its tile, reshaped where a side is longer than the map has values."""
    shape_class = f"{dtype_class(student.dtype)}/{walk.kind(maps)}"
    constants = config(f"distillation_loss.{kernel}", shape_class, student.device)
    m, n = constants["BLOCK_M"], constants["BLOCK_N"]
    size = m * n
    n_most, m_most = power_of_2(walk.values, 1), power_of_2(walk.sizes[2], 1)
    n = min(n, n_most)
    m = min(size // n, m_most) if n == n_most else min(m, m_most)
    constants |= {"BLOCK_M": m, "BLOCK_N": min(size // m, n_most) if m == m_most else n}
    return constants


def exactness(student: Tensor, teacher: Tensor) -> dict[str, bool]:
    """Whether the kernels take a constant from s - t: two maps in half precision lose more by their own
    rounding than by that of s - t."""
    return {"SHIFT": torch.float32 in (student.dtype, teacher.dtype)}


def check(
    name: str, student: Tensor, teacher: Tensor, axis: str, direction: str, temperature: float, reduction: str
) -> None:
    """What the public function has refused already; an exported graph calls the operator itself."""
    if student.shape != teacher.shape or student.dim() != 4 or student.numel() == 0:
        raise ValueError(
            f"{name}: student has shape {tuple(student.shape)}, teacher {tuple(teacher.shape)}; "
            "expected the same (B, C, h, w), not empty"
        )
    if teacher.dtype not in TRITON_DTYPES or teacher.device != student.device:
        raise ValueError(
            f"{name}: teacher is {teacher.dtype} on {teacher.device}; expected float32, float16 or bfloat16 "
            f"on {student.device}"
        )
    if axis not in ("channel", "width") or direction not in ("student||teacher", "teacher||student"):
        raise ValueError(f"{name}: unknown axis {axis!r} or direction {direction!r}")
    if reduction not in ("mean", "batchmean") or not 0 < temperature < math.inf:
        raise ValueError(f"{name}: unknown reduction {reduction!r}, or temperature {temperature} not above 0")
