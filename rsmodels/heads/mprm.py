"""RS-SAM's multi-scale progressive refinement module (section 3.5): MHFF over images, MFF over masks.

All norms are over channels: a batch norm fails on the pooled 1x1 map of AFFM at batch 1.
Shapes: B batch, D decoder width, K classes, E embedding that image and masks are compared in (32).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rsmodels.layers import MLP, LayerNorm2d


class MaskFeatureFusion(nn.Module):
    """D_fusion = f(f(x)) with f = ReLU∘MLP (eq. 5, 6): (B, K, D) → (B, K, E).

    `x` is the sum of the mask tokens over scales, or one scale's where MFF is switched off.

    Args:
        last_relu: keep the very last ReLU, as eq. (5) has it; without, no class embedding can die.
    """

    def __init__(self, dim: int, out_dim: int, *, last_relu: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            MLP(dim, dim, activation="relu"),
            nn.ReLU(),
            MLP(dim, dim, out_dim, activation="relu"),
            nn.ReLU() if last_relu else nn.Identity(),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(tokens)


class HybridFeatureFusion(nn.Module):
    """F_fusion from the decoders' maps, coarse to fine, and an early block's: → (B, E, H/4, W/4).

    Args:
        embed_dim: channels of the early map.
        dim: D.
        out_dim: E.
    """

    def __init__(self, embed_dim: int, dim: int, out_dim: int) -> None:
        super().__init__()
        self.ups = nn.ModuleList(make_up(dim, dim) for _ in range(3))
        self.fusions = nn.ModuleList(AdaptiveFeatureFusion(dim) for _ in range(3))
        self.up_early = nn.Sequential(make_up(embed_dim, dim), make_up(dim, dim))
        self.fusion = nn.Sequential(
            nn.Conv2d(dim, dim, kernel_size=3, padding=1),
            LayerNorm2d(dim),
            nn.GELU(),
            nn.Conv2d(dim, out_dim, kernel_size=1),
        )

    def forward(self, features: Sequence[Tensor], early: Tensor) -> Tensor:
        """Fuse.

        Args:
            features: (B, D, ·, ·) at 1/32, 1/16, 1/8 and 1/4, in that order.
            early: (B, embed_dim, H/16, W/16).
        """
        x, *finer = features
        for up, fusion, feature in zip(self.ups, self.fusions, finer, strict=True):
            x = fusion(up(x), feature)
        return self.fusion(x + self.up_early(early))


class AdaptiveFeatureFusion(nn.Module):
    """AFFM (eq. 4): blend a coarse map, upsampled, with a fine one: twice (B, D, h, w) → (B, D, h, w)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.local_attention = make_bottleneck(dim)
        self.global_attention = make_bottleneck(dim)
        self.spatial = nn.Conv2d(1, 1, kernel_size=7, padding=3)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        total = coarse + fine
        context = self.local_attention(total) + self.global_attention(total.mean(dim=(2, 3), keepdim=True))
        weight = torch.sigmoid(self.spatial(context.mean(dim=1, keepdim=True)))
        return coarse * weight + fine * (1 - weight) + context


def make_up(in_dim: int, out_dim: int) -> nn.Sequential:
    """Twice the size: transposed convolution, norm, GELU."""
    return nn.Sequential(
        nn.ConvTranspose2d(in_dim, out_dim, kernel_size=2, stride=2), LayerNorm2d(out_dim), nn.GELU()
    )


def make_bottleneck(dim: int) -> nn.Sequential:
    """Pointwise D → D/4 → D with norms, AFFM's attention."""
    return nn.Sequential(
        nn.Conv2d(dim, dim // 4, kernel_size=1),
        LayerNorm2d(dim // 4),
        nn.ReLU(),
        nn.Conv2d(dim // 4, dim, kernel_size=1),
        LayerNorm2d(dim),
    )
