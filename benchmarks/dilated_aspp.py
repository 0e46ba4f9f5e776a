"""Dilated pyramids (ASPP, the masked-image head) against eager and compiled PyTorch in both layouts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import rskernels
from benchmarks.measure import PASSES, Call, Case, batches, call_of, device, dtypes, sized

DILATIONS = (1, 6, 12, 18)
# relu's gradient jumps: a value that rounding moves across 0 is a gradient there, or none.
RELU_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 6e-2}


@dataclass(frozen=True)
class Shape:
    """Four branches of `outputs` channels: on four features of these channels, or on one that all share."""

    name: str
    batch: int
    inputs: tuple[int, ...]
    size: int
    outputs: int = 256
    projection: int = 0

    def flops(self) -> float:
        """Of the products inside the map: those with the zero padding are skipped by oneDNN and by us. Per
        axis, of a tap's three positions two miss `dilation` pixels of `size`."""
        pixels = self.batch * self.size**2
        inputs = self.inputs * (4 // len(self.inputs))
        taps = [(3 - 2 * d / self.size) ** 2 for d in DILATIONS]
        products = sum(c * n for c, n in zip(inputs, taps, strict=True)) + 4 * self.projection
        return 2.0 * pixels * self.outputs * products

    def bytes(self, dtype: torch.dtype, which: str) -> float:
        """Features, weights and output once; backward reads the first two and the output's gradient, and
        writes the gradients of features and weights."""
        pixels = self.batch * self.size**2
        features = pixels * sum(self.inputs)
        weights = 9 * sum(self.inputs) * (4 // len(self.inputs)) * self.outputs
        weights += 4 * self.outputs * self.projection
        out = pixels * (self.projection or 4 * self.outputs)
        forward, backward = features + weights + out, 2 * (features + weights) + out
        moved = {"forward": forward, "backward": backward, "both": forward + backward}[which]
        return float(moved * dtype.itemsize)


SHAPES = [
    Shape("head 256-1024, 32x32, projected", 2, (256, 512, 1024, 1024), 32, projection=256),
    Shape("ASPP 2048, 32x32", 1, (2048,), 32),
    Shape("ASPP 256, 64x64", 1, (256,), 64),
]


def _composed(layout: torch.memory_format, activation: str, features: int, *tensors: Tensor) -> Tensor:
    """Convolutions, concatenation, folded norm, activation, projection, as a user writes them."""
    xs, weights, biases = (
        tensors[:features],
        tensors[features : features + 4],
        tensors[features + 4 : features + 8],
    )
    scale, shift, *projection = tensors[features + 8 :]
    xs = xs * 4 if features == 1 else xs
    branches = [
        F.conv2d(x, weight, bias, padding=d, dilation=d)
        for x, weight, bias, d in zip(xs, weights, biases, DILATIONS, strict=True)
    ]
    out = torch.cat(branches, 1) * scale[:, None, None] + shift[:, None, None]
    out = F.gelu(out) if activation == "gelu" else F.relu(out)
    if projection:
        out = F.conv2d(out, projection[0][:, :, None, None].contiguous(memory_format=layout), projection[1])
    return out


def _ours(activation: str, features: int, *tensors: Tensor) -> Tensor:
    weights, biases = tensors[features : features + 4], tensors[features + 4 : features + 8]
    scale, shift, *projection = tensors[features + 8 :]
    return rskernels.dilated_aspp(
        tensors[0] if features == 1 else tensors[:features], weights, biases, dilations=DILATIONS,
        scale_shift=(scale, shift), activation=activation, projection=tuple(projection) or None,
    )  # fmt: skip


def build(
    shape: Shape, activation: str, dtype: torch.dtype, which: str, compiled: bool = True
) -> dict[str, Call]:
    generator = torch.Generator().manual_seed(0)
    channels, train = 4 * shape.outputs, which != "forward"

    def random(*size: int, gain: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator) * gain).to(device(), dtype)

    inputs = shape.inputs * 4 if len(shape.inputs) == 1 else shape.inputs
    features = [random(shape.batch, c, shape.size, shape.size) for c in shape.inputs]
    weights = [random(shape.outputs, c, 3, 3, gain=(9 * c) ** -0.5) for c in inputs]
    vectors = [random(shape.outputs) for _ in range(4)]
    folded = [1 + random(channels, gain=0.1), random(channels)]
    last = [random(shape.projection, channels, gain=channels**-0.5), random(shape.projection)]
    grad = random(shape.batch, shape.projection or channels, shape.size, shape.size)

    def inputs_in(layout: torch.memory_format) -> list[Tensor]:
        """Leaves; the folded norm gets no gradient."""
        maps = [t.clone(memory_format=layout).requires_grad_(train) for t in (*features, *weights)]
        rest = [t.clone().requires_grad_(train) for t in (*vectors, *(last if shape.projection else ()))]
        return [*maps, *rest[:4], *folded, *rest[4:]]

    count = len(shape.inputs)
    ours = partial(_ours, activation, count)
    calls = {}
    for name, layout in (("channels last", torch.channels_last), ("eager", torch.contiguous_format)):
        tensors, out_grad = inputs_in(layout), grad.contiguous(memory_format=layout)
        calls["rskernels" if name == "channels last" else "rskernels, NCHW"] = call_of(
            which, ours, tensors, out_grad
        )
        peer = partial(_composed, layout, activation, count)
        calls[name] = call_of(which, peer, tensors, out_grad)
        if compiled:
            torch._dynamo.reset()
            calls[f"compiled, {name}"] = call_of(which, torch.compile(peer, dynamic=False), tensors, out_grad)
    return calls


def cases() -> list[Case]:
    shapes = [replace(shape, batch=batches() * shape.batch) for shape in SHAPES]
    return [
        Case(
            name=f"{which}, {sized(shape.name)}, {activation}, {str(dtype)[6:]}",
            build=partial(build, shape, activation, dtype, which),
            dtype=dtype,
            flops=shape.flops() * {"forward": 1, "backward": 2, "both": 3}[which],
            bytes=shape.bytes(dtype, which),
            beside=("rskernels, NCHW",),
            tolerance=RELU_TOLERANCE[dtype] if activation == "relu" and which != "forward" else 0.0,
        )
        for which in PASSES
        for shape, activation in zip(shapes, ("gelu", "relu", "relu"), strict=True)
        for dtype in dtypes()
    ]
