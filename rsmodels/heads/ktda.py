"""KTDA's modules between student and decoder (arXiv 2412.13823): alignment, modulation, neck.

Shapes: B batch, C_i channels of stage i, D teacher embedding, h/w the teacher's grid.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rsmodels.layers import FeedForward, LayerNorm, SelfAttention, conv_of_resized, resize

# Levels of the neck, relative to the teacher's grid.
NECK_SCALES = (4, 2, 1, 0.5)


class FeatureAlignment(nn.Module):
    """FAM (eq. 1): every stage to the teacher's width and grid; stage maps (B, C_i, ·, ·) → (B, D, h, w)."""

    def __init__(self, in_dims: Sequence[int], dim: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(in_dim, dim, kernel_size=1) for in_dim in in_dims)
        init_weights(self)

    def forward(self, features: Sequence[Tensor], grid: tuple[int, int]) -> list[Tensor]:
        aligned = []
        for conv, x in zip(self.convs, features, strict=True):
            # Interpolation weights sum to 1, so that a 1x1 convolution, bias included, may come before or
            # after: it comes where there are fewer pixels.
            shrinks = x.shape[-2] * x.shape[-1] > grid[0] * grid[1]
            aligned.append(conv(resize(x, grid)) if shrinks else resize(conv(x), grid))
        return aligned


class FeatureModulation(nn.Module):
    """FMM: `depth` pre-norm transformer blocks per scale, each map (B, D, h, w) → (B, D, h, w)."""

    def __init__(self, dim: int, *, scales: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            nn.Sequential(*(Block(dim, num_heads=num_heads) for _ in range(depth))) for _ in range(scales)
        )
        self.activation_checkpointing = False
        init_weights(self)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        modulated = []
        for blocks, x in zip(self.scales, features, strict=True):
            tokens = x.flatten(2).transpose(1, 2)
            if self.activation_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(blocks, tokens, use_reentrant=False)
            else:
                tokens = blocks(tokens)
            modulated.append(tokens.transpose(1, 2).unflatten(2, x.shape[-2:]))
        return modulated


class Block(nn.Module):
    """Pre-norm transformer block: (B, N, D) → (B, N, D)."""

    def __init__(self, dim: int, *, num_heads: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = SelfAttention(dim, num_heads=num_heads)
        self.norm2 = LayerNorm(dim)
        self.mlp = FeedForward(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MultiLevelNeck(nn.Module):
    """Maps (B, C_i, h, w) of one size → a pyramid (B, D, ·, ·) at 4, 2, 1 and 1/2 times that size.

    1x1 convolution, bilinear resize, 3x3 convolution per level, as mmsegmentation's neck for plain ViTs.
    """

    def __init__(self, in_dims: Sequence[int], dim: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(nn.Conv2d(in_dim, dim, kernel_size=1) for in_dim in in_dims)
        self.convs = nn.ModuleList(nn.Conv2d(dim, dim, kernel_size=3, padding=1) for _ in in_dims)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        levels = []
        conv: Any
        for lateral, conv, x, scale in zip(
            self.lateral_convs, self.convs, features, NECK_SCALES, strict=True
        ):
            if scale < 1:
                # Before the 1x1 convolution, as in FeatureAlignment. By the factor, as mmsegmentation: 19
                # become 9 whose centres lie 2 apart, not 19/9.
                x = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
            x = lateral(x)
            if scale > 1:
                size = [int(side * scale) for side in x.shape[-2:]]
                levels.append(conv_of_resized(x, size, conv.weight, conv.bias))
            else:
                levels.append(conv(x))
        return levels


def init_weights(module: nn.Module) -> None:
    """The authors' first weights of FAM and FMM: normal of 0.02, cut at two, biases zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
