"""DINOv2's vision transformer (Oquab et al. 2023, https://arxiv.org/abs/2304.07193; registers: Darcet et al.
2023, https://arxiv.org/abs/2309.16588), for any input size.

Parameter for parameter Meta's `dinov2_vit*_pretrain.pth` (without the mask token, which only pretraining
uses): patch 14 or 16, a class token, registers or none, layer scale, SwiGLU in the giant. Attention is
rskernels.rel_pos_attention without tables, the token sequence as a grid of one row.

Shapes: B batch, H/W pixels, h/w patches, R registers, N = 1 + R + h·w tokens, D embedding.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsmodels.encoders.dinov2_weights import load_dinov2
from rsmodels.encoders.plain_vit import PlainViT
from rsmodels.encoders.positions import resize_position_embedding, saved_grid
from rsmodels.layers import FeedForward, LayerNorm, Linear, SelfAttention
from rsmodels.registry import register_encoder
from rsmodels.weights import LoadReport

PATCH_SIZES = (14, 16)


class DinoViT(PlainViT):
    """images (B, 3, H, W) → tokens (B, N, D) after the final norm: class token, registers, patches.

    Args:
        embed_dim, depth, num_heads: of the transformer.
        image_size: H and W (or one int for both), multiples of the patch size; the size of every input.
        patch_size: 14 as published, or 16: the patch embedding is then resized at load time.
        registers: register tokens, 0 or 4 as published.
        swiglu: gated feed-forward layers, as in the giant.
        antialias: resize position embeddings with a low-pass filter, as timm does and as Meta does for models
            with registers; None: with registers only.
    """

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        *,
        image_size: int | tuple[int, int] = 518,
        patch_size: int = 14,
        registers: int = 0,
        swiglu: bool = False,
        antialias: bool | None = None,
    ) -> None:
        if patch_size not in PATCH_SIZES:
            raise ValueError(f"patch_size={patch_size}: expected 14, as DINOv2 was trained with, or 16")
        super().__init__(embed_dim, image_size=image_size, patch_size=patch_size, prefix_tokens=1 + registers)
        self.antialias = registers > 0 if antialias is None else antialias
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, embed_dim)) if registers else None
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.grid_size[0] * self.grid_size[1], embed_dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads=num_heads, swiglu=swiglu) for _ in range(depth)
        )
        self.norm = LayerNorm(embed_dim)

    def to_tokens(self, patches: Tensor) -> Tensor:
        batch, patches = patches.shape[0], patches.flatten(1, 2)
        x = torch.cat([self.cls_token.expand(batch, -1, -1), patches], dim=1) + self.pos_embed
        if self.register_tokens is None:
            return x
        # Registers have no position.
        return torch.cat([x[:, :1], self.register_tokens.expand(batch, -1, -1), x[:, 1:]], dim=1)

    def resize_state(
        self, state: dict[str, Tensor], prefix: str = "", *, saved_size: Sequence[int] | None = None
    ) -> dict[str, str]:
        """Fit patch and position embeddings in `state` to this model, in place; the changed keys, each with
        how.

        saved_size: H and W of the images that the state is for, in pixels; they tell the grid of its
            positions (a rest of a patch counts as one). Without it that grid has to be a square.
        """
        changed = {}
        patch_size, key = self.patch_size, f"{prefix}patch_embed.proj.weight"
        if key in state and state[key].shape[-1] != self.patch_size:
            patch_size = state[key].shape[-1]
            changed[key] = f"patch {patch_size} → {self.patch_size}, bicubic"
            state[key] = resize_patch_embedding(state[key], self.patch_size)
        key = f"{prefix}pos_embed"
        if key in state:
            grid = saved_grid(key, state[key], patch_size=patch_size, saved_size=saved_size, class_token=True)
            if grid != self.grid_size:
                changed[key] = "{}x{} → {}x{} patches, bicubic".format(*grid, *self.grid_size)
                state[key] = resize_position_embedding(
                    state[key], grid, self.grid_size, antialias=self.antialias, class_token=True
                )
        return changed

    def load_pretrained(self, source: str) -> LoadReport:
        """Load a DINOv2 checkpoint (a file or a hub id) in Meta's, timm's or transformers' layout."""
        return load_dinov2(self, source)


class Block(nn.Module):
    """Pre-norm transformer block with layer scale: (B, N, D) → (B, N, D)."""

    def __init__(self, dim: int, *, num_heads: int, swiglu: bool) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = SelfAttention(dim, num_heads=num_heads)
        self.ls1 = LayerScale(dim)
        self.norm2 = LayerNorm(dim)
        self.mlp = SwiGLU(dim) if swiglu else FeedForward(dim)
        self.ls2 = LayerScale(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ls1(x, self.attn(self.norm1(x)))
        return self.ls2(x, self.mlp(self.norm2(x)))


class LayerScale(nn.Module):
    """x + gamma · update, gamma one factor per channel."""

    def __init__(self, dim: int, initial: float = 1e-5) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Tensor, update: Tensor) -> Tensor:
        return torch.addcmul(x, update, self.gamma.to(update.dtype))


class SwiGLU(nn.Module):
    """w3(silu(g) · u) with (g, u) = w12(x), each two thirds of four times the width, rounded up to eights."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = (4 * dim * 2 // 3 + 7) // 8 * 8
        self.w12 = Linear(dim, 2 * hidden)
        self.w3 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * up)


def resize_patch_embedding(weight: Tensor, patch_size: int) -> Tensor:
    """(D, C, p, p) → (D, C, patch_size, patch_size), bicubic, as CrossEarth's and Rein's authors do."""
    size = (patch_size, patch_size)
    resized = F.interpolate(weight.float(), size=size, mode="bicubic", align_corners=False)
    return resized.to(weight.dtype)


@register_encoder
def dinov2_vit_s(*, image_size: int | tuple[int, int] = 518, **options: Any) -> DinoViT:
    """DINOv2 ViT-S: 12 blocks of width 384."""
    return DinoViT(384, 12, 6, image_size=image_size, **options)


@register_encoder
def dinov2_vit_b(*, image_size: int | tuple[int, int] = 518, **options: Any) -> DinoViT:
    """DINOv2 ViT-B: 12 blocks of width 768."""
    return DinoViT(768, 12, 12, image_size=image_size, **options)


@register_encoder
def dinov2_vit_l(*, image_size: int | tuple[int, int] = 518, **options: Any) -> DinoViT:
    """DINOv2 ViT-L: 24 blocks of width 1024."""
    return DinoViT(1024, 24, 16, image_size=image_size, **options)


@register_encoder(fixed=("swiglu",))
def dinov2_vit_g(*, image_size: int | tuple[int, int] = 518, **options: Any) -> DinoViT:
    """DINOv2 ViT-g: 40 blocks of width 1536 with SwiGLU."""
    return DinoViT(1536, 40, 24, image_size=image_size, swiglu=True, **options)


@register_encoder
def dinov2_vit_tiny(*, image_size: int | tuple[int, int] = 112, **options: Any) -> DinoViT:
    """The same encoder small enough to train on a CPU; no pretrained weights are published."""
    return DinoViT(128, 4, 4, image_size=image_size, **options)
