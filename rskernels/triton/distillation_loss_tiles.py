"""How distillation_loss's kernels walk over maps of any layout, and in which tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from rskernels.library import TRITON_DTYPES
from rskernels.triton.launch import config, dtype_class, power_of_2


@dataclass(frozen=True)
class Walk:
    """The maps' distributions in the order of the student's memory."""

    sizes: tuple[int, int, int]  # of M: two outer dimensions and the inner one
    strides: tuple[tuple[int, int, int], ...]  # of every map, and last of a row of the statistics
    values: int
    steps: tuple[int, ...]  # between a distribution's values, of every map
    count: int
    wide: bool  # some offset passes 2^31

    @property
    def outer(self) -> int:
        return self.sizes[0] * self.sizes[1]


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
    return Walk(
        (a[0], b[0], c[0]),
        tuple(zip(a[1], b[1], c[1], strict=True)),
        shape[dim],
        tuple(m.stride(dim) for m in maps),
        math.prod(shape[d] for d in outer),
        max(spans) >= 2**31,
    )


def tile_of(kernel: str, walk: Walk, student: Tensor, maps: int) -> dict[str, int]:
    """The kernel's constants: its tile, reshaped where a side is longer than the map has values."""
    along = [step == 1 for step in walk.steps[:maps]]
    across = [strides[2] == 1 for strides in walk.strides[:maps]]
    kind = "along" if all(along) else "across" if all(across) else "mixed"
    constants = config(f"distillation_loss.{kernel}", f"{dtype_class(student.dtype)}/{kind}", student.device)
    m, n = constants["BLOCK_M"], constants["BLOCK_N"]
    size = m * n
    n_most, m_most = power_of_2(walk.values, 1), power_of_2(walk.sizes[2], 1)
    n = min(n, n_most)
    m = min(size // n, m_most) if n == n_most else min(m, m_most)
    constants |= {"BLOCK_M": m, "BLOCK_N": min(size // m, n_most) if m == m_most else n}
    return constants


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
