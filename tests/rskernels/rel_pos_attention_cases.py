"""Calls of rel_pos_attention, and a backend compared with the reference in float64; as a script
(`python FILE LEVEL`) on one instruction set."""

import sys
from dataclasses import dataclass

import pytest
import torch
from accuracy import allowed_error
from torch import Tensor

import rskernels
import rskernels.ops.rel_pos_attention  # the function of the same name hides the module
from rskernels import dispatch, rel_pos_attention

operator = sys.modules["rskernels.ops.rel_pos_attention"]
needs_cpp = pytest.mark.skipif(
    "cpp" in dispatch.UNAVAILABLE, reason=f"no C++ backend: {dispatch.UNAVAILABLE.get('cpp')}"
)
NAMES = ("out", "qkv", "rel_pos_h", "rel_pos_w", "pad_qkv")
# A gradient below this share of its terms (see terms()) is mostly rounding: that share measures its error.
CANCELLED = 0.5


@dataclass(frozen=True)
class Case:
    """A call: grid, heads, head dim, window side (0: global), with or without tables and pad_qkv."""

    batch: int = 1
    height: int = 9
    width: int = 11
    heads: int = 2
    dim: int = 16
    window: int = 0
    tables: bool = True
    pad: bool = True
    magnitude: float = 1.0
    seed: int = 0

    def arguments(self) -> list[Tensor | None]:
        """qkv, rel_pos_h, rel_pos_w, pad_qkv in float64; biases about as large as scaled products."""
        rng = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=rng, dtype=torch.float64) * std

        channels = 3 * self.heads * self.dim
        rows, columns = (self.window, self.window) if self.window else (self.height, self.width)
        table_std = self.dim**-0.5
        return [
            normal(self.batch, self.height, self.width, channels, std=self.magnitude),
            normal(2 * rows - 1, self.dim, std=table_std) if self.tables else None,
            normal(2 * columns - 1, self.dim, std=table_std) if self.tables else None,
            normal(channels, std=self.magnitude) if self.pad and self.pads() else None,
        ]

    def pads(self) -> bool:
        return self.window > 0 and (self.height % self.window > 0 or self.width % self.window > 0)

    def grad(self) -> Tensor:
        rng = torch.Generator().manual_seed(self.seed + 1)
        shape = (self.batch, self.height, self.width, self.heads * self.dim)
        return torch.randn(*shape, generator=rng, dtype=torch.float64)


def rounded(tensors: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """New leaves in `dtype`."""
    return [None if t is None else t.detach().to(dtype).clone().requires_grad_() for t in tensors]


def run(case: Case, arguments: list[Tensor | None], grad: Tensor, backend: str) -> list[Tensor | None]:
    """Output and gradients of `arguments` on a backend."""
    qkv, rel_pos_h, rel_pos_w, pad_qkv = arguments
    with rskernels.backend(backend):
        out = rel_pos_attention(
            qkv, rel_pos_h, rel_pos_w, num_heads=case.heads, window_size=case.window, pad_qkv=pad_qkv
        )
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(None if t is None else t.grad for t in arguments)]


def terms(case: Case, arguments: list[Tensor | None], grad: Tensor) -> list[Tensor | None]:
    """Gradients with the softmax's denominator held fixed: what the true ones are differences of.

    Where keys are alike (padding) or one key takes all, a softmax has next to no gradient, and what is left
    is the rounding of these terms. Everywhere else their norms are the true gradients' norms.
    """
    qkv, rel_pos_h, rel_pos_w, pad_qkv = arguments
    q, k, v = operator._heads_of_windows(qkv, pad_qkv, case.heads, case.window)
    window = operator._window(qkv, case.window)
    scores = operator._scores(q, k, rel_pos_h, rel_pos_w, case.dim**-0.5, window)
    out = (scores - scores.logsumexp(-1, keepdim=True).detach()).exp() @ v
    out = operator._grid_of_windows(out.transpose(1, 2).flatten(2), qkv, case.window)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(None if t is None else t.grad for t in arguments)]


def relative_error(value: Tensor, truth: Tensor, floor: float = 0.0) -> float:
    return ((value.double() - truth).norm() / truth.norm().clamp_min(max(floor, 1e-30))).item()


def compare(case: Case, dtype: torch.dtype, backend: str = "cpp") -> None:
    """A backend in `dtype` against the float64 reference on the same rounded numbers, eager to measure."""
    arguments = rounded(case.arguments(), dtype)
    grad = case.grad().to(dtype)
    truths = run(case, rounded(arguments, torch.float64), grad, "reference")
    floors = terms(case, rounded(arguments, torch.float64), grad)
    eagers = run(case, rounded(arguments, dtype), grad, "reference")
    values = run(case, arguments, grad, backend)
    for name, value, eager, truth, floor in zip(NAMES, values, eagers, truths, floors, strict=True):
        if truth is None:
            assert value is None, name
            continue
        assert value.dtype == dtype and value.shape == truth.shape, name
        size = CANCELLED * floor.norm().item()
        bound = max(allowed_error(value), 2 * relative_error(eager, truth, size))
        error = relative_error(value, truth, size)
        assert error < bound, f"{name}: error {error:.2e}, allowed {bound:.2e}, {case}"


CASES = [
    Case(height=16, width=16, batch=2, dim=64),
    Case(window=4, dim=16, heads=3),
    Case(window=14, height=20, width=30, dim=64),
    Case(window=5, pad=False),
    Case(window=3, tables=False),
    Case(height=1, width=300, dim=80),
    Case(height=1, width=300, dim=32, tables=False, pad=False, batch=2),
    Case(height=30, width=23, dim=48, heads=1),
    Case(height=1, width=1, dim=17, heads=1),
    Case(height=5, width=3, window=7, dim=256, heads=1),
    Case(height=40, width=7, dim=33),
    Case(height=17, width=19, dim=24),  # an odd number of keys in several tiles
    Case(window=14, height=28, width=42, dim=16, heads=4),  # windows enough: all their queries in one tile
    Case(height=33, width=40, heads=1),  # so many keys: backward cuts a head's queries into parts
    Case(window=4, height=20, width=20, heads=3),  # 75 tasks: some share a sum of the tables' gradients
]


if __name__ == "__main__":  # one instruction set, see test_every_instruction_set
    from rskernels import _C

    assert _C.cpu_capability() == sys.argv[1]
    for each in (CASES[0], CASES[1], CASES[2], CASES[6], CASES[8], *CASES[11:13]):
        compare(each, torch.float32)
        compare(each, torch.bfloat16)
