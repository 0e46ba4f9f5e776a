"""Mask2Former's pixel decoder (Cheng et al. 2022, https://arxiv.org/abs/2112.01527, appendix A): a deformable
transformer over the maps at 1/32, 1/16 and 1/8 (Zhu et al. 2021, https://arxiv.org/abs/2010.04159), and one
step of a feature pyramid to 1/4. No mmcv: the sampling is rskernels.deformable_attention.

Shapes: B batch, C_i channels of level i, D width, h/w a level's pixels, S the pixels of all three levels.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rskernels
from rsmodels.layers import MLP, LayerNorm, Linear, resize

LEVELS = 3  # what the transformer sees; the finest of the four maps joins after it
NORM_GROUPS = 32


class PixelDecoder(nn.Module):
    """Four maps (B, C_i, ·, ·), finest first → mask features (B, D, h, w) at the size of the finest, and the
    three levels (B, D, ·, ·) of the transformer, coarsest first.

    Args:
        in_channels: C_i.
        dim: D; a multiple of 4, of `num_heads` and of `norm_groups`.
        num_layers, num_heads, num_points, mlp_dim: of the transformer; points are per head and level.
        norm_groups: groups of the normalisation after each convolution.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        *,
        dim: int = 256,
        num_layers: int = 6,
        num_heads: int = 8,
        num_points: int = 4,
        mlp_dim: int = 1024,
        norm_groups: int = NORM_GROUPS,
    ) -> None:
        super().__init__()
        if len(in_channels) != LEVELS + 1:
            raise ValueError(
                f"in_channels={list(in_channels)}: expected those of four maps, at strides 4, 8, 16 and 32"
            )
        if any(dim % divisor for divisor in (4, num_heads, norm_groups)):
            raise ValueError(
                f"dim={dim}: expected a multiple of 4, of num_heads={num_heads} and of "
                f"norm_groups={norm_groups}"
            )
        finest, *others = in_channels
        self.dim = dim
        self.samples = (num_heads, LEVELS, num_points)
        self.input_projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, dim, kernel_size=1), GroupNorm(norm_groups, dim))
            for channels in reversed(others)
        )
        self.level_embed = nn.Parameter(torch.empty(LEVELS, dim))
        self.layers = nn.ModuleList(
            DeformableLayer(dim, num_heads=num_heads, num_points=num_points, mlp_dim=mlp_dim)
            for _ in range(num_layers)
        )
        self.lateral = nn.Sequential(
            nn.Conv2d(finest, dim, kernel_size=1, bias=False), GroupNorm(norm_groups, dim)
        )
        self.output = nn.Sequential(
            nn.Conv2d(dim, dim, kernel_size=3, padding=1, bias=False), GroupNorm(norm_groups, dim), nn.ReLU()
        )
        self.mask_projection = nn.Conv2d(dim, dim, kernel_size=1)
        self._init_weights()

    def forward(
        self, features: Sequence[Tensor], sizes: Sequence[tuple[int, int]] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """`sizes`: h and w of the four levels, finest first, to which maps of another size are resized
        bilinearly; None: they have theirs."""
        sizes = [(x.shape[-2], x.shape[-1]) for x in features] if sizes is None else sizes
        finest, *others = features
        fine_size, *sizes = sizes
        sizes = sizes[::-1]  # coarsest first
        maps = [
            project_to(size, x, project)
            for project, x, size in zip(self.input_projections, reversed(others), sizes, strict=True)
        ]
        tokens = torch.cat([to_tokens(x) for x in maps], dim=1)
        position = torch.cat(
            [
                sine_position_encoding(size, self.dim, tokens.device) + self.level_embed[level]
                for level, size in enumerate(sizes)
            ]
        ).to(tokens.dtype)
        # Locations in half precision would miss their pixel.
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        reference, scale = reference_points(sizes, self.samples, dtype, tokens.device)
        for layer in self.layers:
            tokens = layer(tokens, position, sizes, reference, scale)
        levels = [
            level.transpose(1, 2).unflatten(2, size)
            for level, size in zip(tokens.split([h * w for h, w in sizes], dim=1), sizes, strict=True)
        ]
        fine = project_to(fine_size, finest, self.lateral)
        return self.mask_projection(self.output(fine + resize(levels[-1], fine.shape[-2:]))), levels

    def _init_weights(self) -> None:
        """The authors' first weights."""
        nn.init.normal_(self.level_embed)
        for module in self.input_projections.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        for module in (self.lateral[0], self.output[0], self.mask_projection):
            nn.init.kaiming_uniform_(module.weight, a=1)  # type: ignore[arg-type]
        nn.init.zeros_(self.mask_projection.bias)  # type: ignore[arg-type]


class DeformableLayer(nn.Module):
    """Deformable self-attention of the levels' pixels and MLP; post-norm: (B, S, D) → (B, S, D)."""

    def __init__(self, dim: int, *, num_heads: int, num_points: int, mlp_dim: int) -> None:
        super().__init__()
        self.attention = DeformableAttention(dim, num_heads=num_heads, num_points=num_points)
        self.norm1 = LayerNorm(dim, eps=1e-5)
        self.mlp = MLP(dim, mlp_dim, activation="relu")
        self.norm2 = LayerNorm(dim, eps=1e-5)
        for linear in (self.mlp.lin1, self.mlp.lin2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(
        self,
        tokens: Tensor,
        position: Tensor,
        sizes: Sequence[tuple[int, int]],
        reference: Tensor,
        scale: Tensor,
    ) -> Tensor:
        attended = self.attention(tokens + position, tokens, sizes, reference, scale)
        tokens = self.norm1(tokens + attended)
        return self.norm2(tokens + self.mlp(tokens))


class DeformableAttention(nn.Module):
    """Every query reads `num_points` places per head and level, around its own place, that it chooses itself.

    Queries and values (B, S, D) → (B, S, D).
    """

    def __init__(self, dim: int, *, num_heads: int, num_points: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.samples = (num_heads, LEVELS, num_points)
        samples = math.prod(self.samples)
        self.sampling_offsets = Linear(dim, 2 * samples)
        self.attention_weights = Linear(dim, samples)
        self.value_proj = Linear(dim, dim)
        self.output_proj = Linear(dim, dim)
        self._init_weights()

    def forward(
        self,
        queries: Tensor,
        values: Tensor,
        sizes: Sequence[tuple[int, int]],
        reference: Tensor,
        scale: Tensor,
    ) -> Tensor:
        """`reference` and `scale`: reference_points of `sizes`."""
        value_bshd = self.value_proj(values).unflatten(-1, (self.num_heads, -1))
        offsets = self.sampling_offsets(queries).to(reference.dtype)
        locations = (reference + offsets * scale).unflatten(-1, (*self.samples, 2))
        weights = self.attention_weights(queries).unflatten(-1, (self.num_heads, -1)).to(reference.dtype)
        weights = weights.softmax(-1).unflatten(-1, self.samples[1:])
        return self.output_proj(rskernels.deformable_attention(value_bshd, sizes, locations, weights))

    def _init_weights(self) -> None:
        """Every head looks in a direction of its own, point p at distance p + 1 in pixels of each level, all
        with the same weight."""
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, self.samples[2] + 1)
        offsets = directions[:, None, None] * steps[:, None]  # (heads, 1, points, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, LEVELS, -1, -1).flatten())
        for zero in (
            self.sampling_offsets.weight,
            self.attention_weights.weight,
            self.attention_weights.bias,
        ):
            nn.init.zeros_(zero)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm with its arithmetic in float32 at least; the result has the dtype of the input."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return F.group_norm(x.to(dtype), self.num_groups, weight, bias, self.eps).to(x.dtype)


def project_to(size: Sequence[int], x: Tensor, project: nn.Module) -> Tensor:
    """`project`, a 1x1 convolution and its normalisation, of x resized to `size`. The convolution commutes
    with resizing, up to rounding: it runs where there are fewer pixels."""
    conv, norm = project.children()
    grows = size[0] * size[1] > x.shape[-2] * x.shape[-1]
    return norm(resize(conv(x), size) if grows else conv(resize(x, size)))


def to_tokens(x: Tensor) -> Tensor:
    """(B, D, h, w) → (B, h·w, D)."""
    return x.flatten(2).transpose(1, 2)


def reference_points(
    sizes: Sequence[tuple[int, int]], samples: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Where each pixel of each level is, as (x, y) in [0, 1], and how long a pixel of each level is there.

    Args:
        samples: (heads, LEVELS, points) of the attention.
    Returns:
        (S, 2·heads·LEVELS·points), the same pair for all samples, and (2·heads·LEVELS·points,): repeated, for
        additions along pairs are slow.
    """
    heads, _, points = samples
    centres = []
    for size in sizes:
        y, x = ((torch.arange(n, dtype=dtype, device=device) + 0.5) / n for n in size)
        grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=-1)
        centres.append(grid.flatten(0, 1))
    # torch.tensor(..., device=) copies from the host: it would wait, and no CUDA graph could record it.
    steps = [torch.full((), 1 / n, dtype=dtype, device=device) for h, w in sizes for n in (w, h)]
    scale = torch.stack(steps).view(LEVELS, 1, 2).expand(heads, LEVELS, points, 2)
    return torch.cat(centres).repeat(1, math.prod(samples)), scale.flatten()


def sine_position_encoding(size: tuple[int, int], dim: int, device: torch.device) -> Tensor:
    """DETR's position encoding of a grid: (h·w, D) in float32, y in the first half of the channels.

    Positions run from 2π/n to 2π along each side; channels 2i and 2i + 1 of a half hold the sine and the
    cosine of the position over 10000^(4i/D).
    """
    half = dim // 2
    channel = torch.arange(half, device=device, dtype=torch.float32)
    wavelength = 10000 ** (2 * (channel // 2) / half)
    sides = []
    for n in size:
        position = torch.arange(1, n + 1, device=device, dtype=torch.float32) / (n + 1e-6) * (2 * math.pi)
        phase = position[:, None] / wavelength
        sides.append(torch.stack([phase[:, 0::2].sin(), phase[:, 1::2].cos()], dim=-1).flatten(1))
    y, x = sides
    grid = torch.cat([y[:, None].expand(-1, len(x), -1), x.expand(len(y), -1, -1)], dim=-1)
    return grid.flatten(0, 1)
