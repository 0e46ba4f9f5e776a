"""Calls of deformable_attention."""

from dataclasses import dataclass

import torch
from torch import Tensor

NAMES = ("out", "value", "sampling_locations", "attention_weights")


@dataclass(frozen=True)
class Case:
    """A call. Samples lie up to three pixels outside their maps and not on a pixel's centre line, where the
    gradient of a location jumps and rounding would decide the side."""

    batch: int = 2
    queries: int = 29
    heads: int = 3
    dim: int = 16
    shapes: tuple[tuple[int, int], ...] = ((9, 7), (4, 5), (1, 1))
    points: int = 4
    magnitude: float = 1.0
    seed: int = 0

    def arguments(self) -> list[Tensor]:
        """value, sampling_locations, attention_weights in float64."""
        rng = torch.Generator().manual_seed(self.seed)
        pixels = sum(height * width for height, width in self.shapes)
        value = torch.randn(self.batch, pixels, self.heads, self.dim, generator=rng, dtype=torch.float64)
        shape = (self.batch, self.queries, self.heads, len(self.shapes), self.points)
        sides = torch.tensor([[width, height] for height, width in self.shapes]).double()[:, None]
        pixel = (torch.rand(*shape, 2, generator=rng).double() * (sides + 5)).floor() - 3
        pixel += 0.02 + 0.96 * torch.rand(*shape, 2, generator=rng).double()
        weights = torch.randn(*shape, generator=rng, dtype=torch.float64)
        return [self.magnitude * value, (pixel + 0.5) / sides, weights]

    def grad(self) -> Tensor:
        rng = torch.Generator().manual_seed(self.seed + 1)
        shape = (self.batch, self.queries, self.heads * self.dim)
        return torch.randn(*shape, generator=rng, dtype=torch.float64)


def leaves(tensors: list[Tensor], *dtypes: torch.dtype) -> list[Tensor]:
    """New leaves, value in the first dtype and the others in the last."""
    wanted = (dtypes[0], dtypes[-1], dtypes[-1])
    return [t.detach().to(d).clone().requires_grad_() for t, d in zip(tensors, wanted, strict=True)]
