"""KTDA's modules between student and decoder (arXiv 2412.13823): alignment, modulation, neck.

Shapes: B batch, C_i channels of stage i, D teacher embedding, h/w the teacher's grid.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rsmodels.heads.upernet import resize
from rsmodels.layers import FeedForward, LayerNorm, SelfAttention

# Levels of the neck, relative to the teacher's grid.
NECK_SCALES = (4.0, 2.0, 1.0, 0.5)


class FeatureAlignment(nn.Module):
    """FAM (eq. 1): every stage to the teacher's width and grid; stage maps (B, C_i, ·, ·) → (B, D, h, w)."""

    def __init__(self, in_dims: Sequence[int], dim: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(in_dim, dim, kernel_size=1) for in_dim in in_dims)

    def forward(self, features: Sequence[Tensor], grid: tuple[int, int]) -> list[Tensor]:
        return [resize(conv(x), grid) for conv, x in zip(self.convs, features, strict=True)]


class FeatureModulation(nn.Module):
    """FMM: `depth` pre-norm transformer blocks per scale, each map (B, D, h, w) → (B, D, h, w)."""

    def __init__(self, dim: int, *, scales: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            nn.Sequential(*(Block(dim, num_heads=num_heads) for _ in range(depth))) for _ in range(scales)
        )
        self.activation_checkpointing = False

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
        for lateral, conv, x, scale in zip(
            self.lateral_convs, self.convs, features, NECK_SCALES, strict=True
        ):
            size = [max(1, int(side * scale)) for side in x.shape[-2:]]
            levels.append(conv(resize(lateral(x), size)))
        return levels
