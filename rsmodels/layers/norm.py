"""Layer norms over the channels of (..., D) tokens and of (B, D, h, w) maps.

PyTorch's LayerNorm backward accumulates the weight and bias gradients of bf16 inputs on the CPU in bf16
(off by 1 % on a hundred rows, by tens of percent on thousands). Norms that train compute in fp32 there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    trains = torch.is_grad_enabled() and (weight.requires_grad or bias.requires_grad)
    if trains and x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16):
        return F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps).to(x.dtype)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm over the last dimension, with right gradients in bf16 on the CPU. SAM's eps is 1e-6."""

    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return _layer_norm(x, self.weight, self.bias, self.eps)


class LayerNorm2d(nn.LayerNorm):
    """The same over the channels of a map: (B, D, h, w) → (B, D, h, w), channels last in memory."""

    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return _layer_norm(x.permute(0, 2, 3, 1), self.weight, self.bias, self.eps).permute(0, 3, 1, 2)
