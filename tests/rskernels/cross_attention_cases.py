"""Calls of cross_attention, and a backend compared with the reference in float64."""

import sys
from dataclasses import dataclass

import pytest
import torch
from accuracy import allowed_error
from torch import Tensor

import rskernels
import rskernels.ops.cross_attention  # the function of the same name hides the module
from rskernels import dispatch

operator = sys.modules["rskernels.ops.cross_attention"]
needs_cpp = pytest.mark.skipif(
    "cpp" in dispatch.UNAVAILABLE, reason=f"no C++ backend: {dispatch.UNAVAILABLE.get('cpp')}"
)
DTYPES = (torch.float32, torch.bfloat16)
NAMES = ("out", "q", "k", "v")
# A gradient below this share of its terms (see terms()) is mostly rounding: that share measures its error.
CANCELLED = 0.5


@dataclass(frozen=True)
class Case:
    """A call. density: share of True in the mask (None: no mask); shared: k, v have a batch of 1;
    layout: "tokens" as projections leave them, "heads" contiguous, "channels" with d not contiguous."""

    batch: int = 2
    heads: int = 2
    queries: int = 20
    keys: int = 30
    dim: int = 16
    density: float | None = None
    drop: bool = False
    shared: tuple[bool, bool] = (False, False)
    layout: str = "tokens"
    magnitude: float = 1.0
    scale: float | None = None
    seed: int = 0

    def inputs(self, dtype: torch.dtype) -> tuple[list[Tensor], Tensor | None, Tensor]:
        """q, k, v with their layout as leaves, the mask, and the gradient of the output."""
        rng = torch.Generator().manual_seed(self.seed)

        def normal(batch: int, tokens: int, std: float = 1.0) -> Tensor:
            shape = {
                "tokens": (batch, tokens, self.heads, self.dim),
                "heads": (batch, self.heads, tokens, self.dim),
                "channels": (batch, self.heads, self.dim, tokens),
            }[self.layout]
            x = (torch.randn(shape, generator=rng, dtype=torch.float64) * std).to(dtype)
            if self.layout == "tokens":
                return x.transpose(1, 2)
            return x if self.layout == "heads" else x.transpose(2, 3)

        k_batch, v_batch = (1 if shared else self.batch for shared in self.shared)
        leaves = [
            normal(self.batch, self.queries, self.magnitude),
            normal(k_batch, self.keys, self.magnitude),
            normal(v_batch, self.keys),
        ]
        mask = None
        if self.density is not None:
            mask = torch.rand(self.batch, self.queries, self.keys, generator=rng) < self.density
            mask[:, :, self.keys // 3 : 2 * self.keys // 3] = False  # whole tiles of keys
            mask[0, self.queries // 2] = False  # attends nowhere, hence everywhere
        return [leaf.requires_grad_() for leaf in leaves], mask, normal(self.batch, self.queries)


def run(case: Case, leaves: list[Tensor], mask: Tensor | None, grad: Tensor, backend: str) -> list[Tensor]:
    """Output and gradients on a backend; what needs no gradient gives None."""
    with rskernels.backend(backend):
        out = rskernels.cross_attention(*leaves, mask=mask, scale=case.scale, drop_first_key_value=case.drop)
    for leaf in leaves:
        leaf.grad = None
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def as_double(leaves: list[Tensor]) -> list[Tensor]:
    return [leaf.detach().double().requires_grad_() for leaf in leaves]


def terms(case: Case, leaves: list[Tensor], mask: Tensor | None, grad: Tensor) -> list[Tensor]:
    """Gradients with the softmax's denominator held fixed: what the true ones are differences of.

    Where keys are alike, or one key takes all, a softmax has next to no gradient, and what is left is the
    rounding of these terms; so it is with v's where gradients of the output cancel. Everywhere else their
    norms are the true gradients' norms.
    """
    q, k, v = leaves
    scores = operator._scores(q, k, mask, case.dim**-0.5 if case.scale is None else case.scale)
    p = (scores - scores.logsumexp(-1, keepdim=True).detach()).exp()
    (p @ operator._kept_values(v, case.drop)).backward(grad.to(q.dtype))
    # v's is a sum over queries, of as many signs: what terms of random signs would add up to.
    squares = (p.square().transpose(-2, -1) @ grad.to(q.dtype).square()).sum_to_size(v.shape)
    return [torch.zeros(()), q.grad, k.grad, operator._kept_values(squares.sqrt().detach(), case.drop)]


def relative_error_of(value: Tensor, truth: Tensor, floor: float) -> float:
    return ((value.double() - truth).norm() / truth.norm().clamp_min(max(floor, 1e-30))).item()


def compare(case: Case, dtype: torch.dtype, backend: str = "cpp") -> None:
    """A backend in `dtype` against the float64 reference on the same rounded numbers, eager to measure."""
    leaves, mask, grad = case.inputs(dtype)
    truths = run(case, as_double(leaves), mask, grad, "reference")
    floors = terms(case, as_double(leaves), mask, grad)
    eagers = run(case, leaves, mask, grad, "reference")
    values = run(case, leaves, mask, grad, backend)
    for name, value, eager, truth, floor in zip(NAMES, values, eagers, truths, floors, strict=True):
        assert value.dtype == dtype and value.shape == truth.shape, name
        size = CANCELLED * floor.norm().item()
        bound = max(allowed_error(value, case.queries * case.keys), 2 * relative_error_of(eager, truth, size))
        error = relative_error_of(value, truth, size)
        assert error <= bound, f"{name} of {case}: error {error:.2e}, allowed {bound:.2e}"


CASES = [
    Case(batch=1, heads=8, queries=7, keys=1030, dim=16),  # SAM, tokens to image: the keys are cut
    Case(heads=8, queries=1030, keys=9, dim=16),  # SAM, image to tokens: few keys
    Case(heads=8, queries=10, keys=10, dim=32),  # SAM, tokens to tokens
    Case(heads=3, queries=100, keys=1100, dim=32, density=0.3),  # Mask2Former
    Case(heads=1, queries=300, keys=100, dim=300, drop=True, shared=(True, True)),  # Rein
    Case(batch=3, heads=1, queries=600, keys=40, dim=20, drop=True, shared=(True, False)),
    Case(batch=1, queries=530, keys=530, dim=64),  # injector: parts of the queries
    Case(heads=3, queries=33, keys=700, dim=5, density=0.02, drop=True, layout="heads"),
    Case(queries=5, keys=519, dim=7, drop=True, magnitude=2.0),  # few queries, tails
    Case(queries=9, keys=600, dim=48, density=0.5, shared=(False, True), layout="channels"),
    Case(batch=1, heads=1, queries=1, keys=1, dim=1),
    Case(batch=1, heads=1, queries=1, keys=1, dim=3, drop=True),
    Case(heads=1, queries=70, keys=513, dim=257, magnitude=0.1, scale=0.7),
    Case(queries=100, keys=1100, dim=32),  # no mask: the keys are cut
    Case(
        heads=1, queries=300, keys=70, dim=72, density=0.1, drop=True, shared=(True, False)
    ),  # several tiles
    Case(queries=7, keys=700, dim=16, shared=(True, True)),
    Case(batch=1, queries=1, keys=1, dim=256, density=0.02, magnitude=0.1, seed=2),  # one key takes all
]
