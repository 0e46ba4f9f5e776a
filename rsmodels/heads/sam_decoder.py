"""SAM's mask decoder without prompts (Kirillov et al. 2023, https://arxiv.org/abs/2304.02643).

The two-way transformer and the position encoding are SAM's, parameter for parameter; its attention runs
through rskernels.cross_attention. Shapes: B batch, h/w tokens, N = h·w, Q query tokens, D embedding.
"""

import math

import torch
from torch import Tensor, nn

import rskernels
from rsmodels.layers import MLP, LayerNorm, LayerNorm2d, Linear


class TwoWayTransformer(nn.Module):
    """Query tokens and an image embedding that attend to each other.

    Args:
        dim: D.
        num_heads, mlp_dim, depth: of the blocks.
        downsample: the cross-attentions work at width D / downsample.
    """

    def __init__(
        self, dim: int = 256, *, depth: int = 2, num_heads: int = 8, mlp_dim: int = 2048, downsample: int = 2
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TwoWayBlock(dim, num_heads=num_heads, mlp_dim=mlp_dim, downsample=downsample, first=i == 0)
            for i in range(depth)
        )
        self.final_attn_token_to_image = Attention(dim, num_heads=num_heads, downsample=downsample)
        self.norm_final_attn = LayerNorm(dim, eps=1e-5)

    def forward(self, image: Tensor, image_pe: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Update both sides.

        Args:
            image: (B, D, h, w).
            image_pe: (D, h, w), the position encoding of the grid.
            tokens: (B, Q, D); they are also their own position term.
        Returns:
            the updated image embedding (B, N, D) and tokens (B, Q, D).
        """
        keys = image.flatten(2).transpose(1, 2)
        key_pe = image_pe.flatten(1).transpose(0, 1)
        queries = tokens
        for layer in self.layers:
            queries, keys = layer(queries, keys, tokens, key_pe)
        attended = self.final_attn_token_to_image(queries + tokens, keys + key_pe, keys)
        queries = self.norm_final_attn(queries + attended)
        return keys, queries


class TwoWayBlock(nn.Module):
    """Self-attention of the tokens, tokens to image, MLP on the tokens, image to tokens; post-norm.

    `first`: the first block's self-attention has no position term and no residual, for the tokens are
    nothing but position terms yet.
    """

    def __init__(self, dim: int, *, num_heads: int, mlp_dim: int, downsample: int, first: bool) -> None:
        super().__init__()
        self.first = first
        self.self_attn = Attention(dim, num_heads=num_heads)
        self.norm1 = LayerNorm(dim, eps=1e-5)
        self.cross_attn_token_to_image = Attention(dim, num_heads=num_heads, downsample=downsample)
        self.norm2 = LayerNorm(dim, eps=1e-5)
        self.mlp = MLP(dim, mlp_dim, activation="relu")
        self.norm3 = LayerNorm(dim, eps=1e-5)
        self.norm4 = LayerNorm(dim, eps=1e-5)
        self.cross_attn_image_to_token = Attention(dim, num_heads=num_heads, downsample=downsample)

    def forward(
        self, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.first:
            queries = self.self_attn(queries, queries, queries)
        else:
            q = queries + query_pe
            queries = queries + self.self_attn(q, q, queries)
        queries = self.norm1(queries)

        k = keys + key_pe
        queries = self.norm2(queries + self.cross_attn_token_to_image(queries + query_pe, k, keys))
        queries = self.norm3(queries + self.mlp(queries))
        keys = self.norm4(keys + self.cross_attn_image_to_token(k, queries + query_pe, queries))
        return queries, keys


class Attention(nn.Module):
    """Multi-head attention at width D / downsample: q (B, Q, D), k and v (B, M, D) → (B, Q, D).

    `mask` (B, Q, M) is rskernels.cross_attention's: True = attend.
    """

    def __init__(self, dim: int, *, num_heads: int, downsample: int = 1) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = Linear(dim, dim // downsample)
        self.k_proj = Linear(dim, dim // downsample)
        self.v_proj = Linear(dim, dim // downsample)
        self.out_proj = Linear(dim // downsample, dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q_bhqd, k_bhmd, v_bhmd = (
            project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v))
        )
        out_bhqd = rskernels.cross_attention(q_bhqd, k_bhmd, v_bhmd, mask=mask)
        return self.out_proj(out_bhqd.transpose(1, 2).flatten(2))


class RandomPositionEncoding(nn.Module):
    """SAM's random-Fourier position encoding of a grid: size (h, w) → (D, h, w) in float32."""

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, dim // 2))

    def forward(self, size: tuple[int, int]) -> Tensor:
        frequencies = self.positional_encoding_gaussian_matrix.float()
        y, x = (
            2 * (torch.arange(n, device=frequencies.device, dtype=torch.float32) + 0.5) / n - 1 for n in size
        )
        # Products and no matmul: autocast would round the coordinates to bf16.
        phase = x[None, :, None] * frequencies[0] + y[:, None, None] * frequencies[1]
        phase = 2 * math.pi * phase
        return torch.cat([phase.sin(), phase.cos()], dim=-1).permute(2, 0, 1)


def make_upscaling(dim: int, out_dim: int) -> nn.Sequential:
    """SAM's output upscaling: (B, D, h, w) → (B, out_dim, 4h, 4w); SAM has out_dim = D / 8."""
    return nn.Sequential(
        nn.ConvTranspose2d(dim, dim // 4, kernel_size=2, stride=2),
        LayerNorm2d(dim // 4),
        nn.GELU(),
        nn.ConvTranspose2d(dim // 4, out_dim, kernel_size=2, stride=2),
        nn.GELU(),
    )
