"""Calls of dilated_aspp, and the C++ kernel compared with the reference in float64."""

import sys
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import rskernels
import rskernels.ops.dilated_aspp  # the function of the same name hides the module
from rskernels import dispatch

operator = sys.modules["rskernels.ops.dilated_aspp"]
needs_cpp = pytest.mark.skipif(
    "cpp" in dispatch.UNAVAILABLE, reason=f"no C++ backend: {dispatch.UNAVAILABLE.get('cpp')}"
)
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@dataclass(frozen=True)
class Case:
    """A call: one feature map of each of `inputs` channels, or one map that all branches share."""

    batch: int = 2
    inputs: tuple[int, ...] = (16, 24)
    outputs: tuple[int, ...] = (16, 8)
    height: int = 9
    width: int = 11
    dilations: tuple[int, ...] = (1, 4)
    shared: bool = False
    bias: bool = True
    norm: bool = False
    activation: str | None = "gelu"
    projection: int = 0
    magnitude: float = 1.0
    seed: int = 0

    def branches(self) -> int:
        return len(self.outputs)

    def tensors(self) -> dict[str, Tensor]:
        """By name, in float64; scale and shift get no gradient."""
        rng = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=rng, dtype=torch.float64) * std

        inputs = self.inputs[:1] * self.branches() if self.shared else self.inputs
        maps = inputs[:1] if self.shared else inputs
        found = {
            f"x{i}": normal(self.batch, c, self.height, self.width, std=self.magnitude)
            for i, c in enumerate(maps)
        }
        pairs = zip(self.outputs, inputs, strict=True)
        found |= {f"w{i}": normal(o, c, 3, 3, std=(9 * c) ** -0.5) for i, (o, c) in enumerate(pairs)}
        if self.bias:  # one branch goes without
            found |= {f"b{i}": normal(o) for i, o in enumerate(self.outputs) if i != 1}
        channels = sum(self.outputs)
        if self.norm:
            found |= {"scale": 1 + normal(channels, std=0.2), "shift": normal(channels)}
        if self.projection:
            found |= {
                "pw": normal(self.projection, channels, std=channels**-0.5),
                "pb": normal(self.projection),
            }
        return found

    def grad(self) -> Tensor:
        rng = torch.Generator().manual_seed(self.seed + 1)
        channels = self.projection or sum(self.outputs)
        return torch.randn(self.batch, channels, self.height, self.width, generator=rng, dtype=torch.float64)

    def call(self, found: dict[str, Tensor]) -> Tensor:
        n = self.branches()
        return rskernels.dilated_aspp(
            found["x0"] if self.shared else [found[f"x{i}"] for i in range(n)],
            [found[f"w{i}"] for i in range(n)],
            [found.get(f"b{i}") for i in range(n)],
            dilations=self.dilations,
            scale_shift=(found["scale"], found["shift"]) if self.norm else None,
            activation=self.activation,
            projection=(found["pw"], found["pb"]) if self.projection else None,
        )


def leaves(found: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name: t.detach().to(dtype).clone().requires_grad_(name not in ("scale", "shift"))
        for name, t in found.items()
    }


def run(case: Case, found: dict[str, Tensor], grad: Tensor, backend: str = "cpp") -> dict[str, Tensor]:
    """Output and the gradient of every tensor that requires one."""
    wanted = {name: t for name, t in found.items() if t.requires_grad}
    with rskernels.backend(backend):
        out = case.call(found)
    gradients = torch.autograd.grad(out, list(wanted.values()), grad.to(out.dtype))
    return {"out": out.detach()} | dict(zip(wanted, gradients, strict=True))


def compare(case: Case, dtype: torch.dtype, assert_accurate) -> None:
    """C++ in `dtype` against the float64 reference on the same rounded numbers, eager as the measure."""
    found, grad = leaves(case.tensors(), dtype), case.grad().to(dtype)
    truth = run(case, leaves(found, torch.float64), grad.double(), "reference")
    eager = run(case, leaves(found, dtype), grad, "reference")
    for name, value in run(case, found, grad).items():
        assert value.dtype == dtype
        assert_accurate(value, eager[name], truth[name], f"{name} of {case}")


CASES = [
    Case(inputs=(16,), shared=True, dilations=(2, 5), norm=True, activation="relu"),
    Case(projection=20, norm=True),
    Case(inputs=(7, 5), outputs=(3, 17), dilations=(30, 2), projection=9, activation="gelu_tanh"),
    Case(inputs=(33,), outputs=(20,), dilations=(1,), height=1, width=40, batch=1, activation=None),
    Case(height=40, width=1, dilations=(1, 6), activation="relu", projection=3),
    Case(inputs=(300,), outputs=(270,), dilations=(3,), height=17, width=18, batch=1),
    Case(
        inputs=(8,),
        outputs=(8,),
        dilations=(12,),
        height=3,
        width=300,
        batch=1,
        activation=None,
        projection=8,
    ),
    Case(inputs=(1, 1), outputs=(1, 1), height=1, width=1, batch=1, bias=False, activation="relu"),
]
