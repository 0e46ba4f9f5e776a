"""CrossEarth's geospatial semantic extractor and injector (arXiv 2410.22629, section 3.3, eq. 7).

Shapes: B batch, H/W pixels, h/w the encoder's grid, N = h·w, D embedding.
"""

import torch
from torch import Tensor, nn

import rskernels
from rsmodels.layers import Linear

LAYERS = 5


class GeospatialExtractor(nn.Module):
    """GSE: five 3x3 convolutions, each with ReLU; images (B, 3, H, W) → queries (B, N, D).

    Args:
        dim: D.
        stride: pixels per token, a power of two up to 32: that many of the convolutions halve the map.
        width: channels after the first; each one that follows doubles them, the last one has D.
    """

    def __init__(self, dim: int, *, stride: int = 16, width: int = 64) -> None:
        super().__init__()
        halvings = stride.bit_length() - 1
        if stride < 1 or stride & (stride - 1) or halvings > LAYERS or width < 1:
            raise ValueError(
                f"GSE with stride={stride}, width={width}: expected a stride that is a power of two up to "
                f"{1 << LAYERS}, and a width of at least 1"
            )
        channels = [3, *(width << i for i in range(LAYERS - 1)), dim]
        self.layers = nn.Sequential()
        for i in range(LAYERS):
            step = 2 if i < halvings else 1
            self.layers.append(nn.Conv2d(channels[i], channels[i + 1], 3, stride=step, padding=1))
            self.layers.append(nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).flatten(2).transpose(1, 2)


class Injector(nn.Module):
    """Geospatial queries (B, N, D) look at a block's features (B, D, h, w) → the features with what was found
    added, through a scale per channel that starts at zero.

    Args:
        dim: D.
        num_heads: heads of the attention.
    """

    def __init__(self, dim: int, *, num_heads: int = 8) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"injector with {num_heads} heads: expected a divisor of its width {dim}")
        self.num_heads = num_heads
        self.q_proj = Linear(dim, dim)
        self.kv_proj = Linear(dim, 2 * dim)
        self.out_proj = Linear(dim, dim)
        self.scale = nn.Parameter(torch.zeros(dim))

    def forward(self, feature: Tensor, queries: Tensor) -> Tensor:
        tokens = feature.flatten(2).transpose(1, 2)
        q = self._split(self.q_proj(queries))
        k, v = map(self._split, self.kv_proj(tokens).chunk(2, dim=-1))
        found = rskernels.cross_attention(q, k, v).transpose(1, 2).flatten(2)
        update = self.scale * self.out_proj(found)
        return feature + update.transpose(1, 2).unflatten(2, feature.shape[-2:])

    def _split(self, x: Tensor) -> Tensor:
        """(B, N, D) → (B, heads, N, d), a view."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
