"""Layer norms over the channels of (..., D) tokens and of (B, D, h, w) maps, through rskernels.layer_norm."""

import torch
from torch import Tensor, nn

import rskernels


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm over the last dimension, with right gradients in bf16 on the CPU. SAM's eps is 1e-6."""

    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The result has `dtype`, that of x unless given."""
        return rskernels.layer_norm(x, self.weight, self.bias, eps=self.eps, dtype=dtype)


class LayerNorm2d(nn.LayerNorm):
    """The same over the channels of a map: (B, D, h, w) → (B, D, h, w), channels last in memory."""

    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        rows = rskernels.layer_norm(x.permute(0, 2, 3, 1), self.weight, self.bias, eps=self.eps)
        return rows.permute(0, 3, 1, 2)
