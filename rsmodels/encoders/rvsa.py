"""ViT with rotated varied-size window attention, MTP's backbone (RVSA: Wang et al. 2022,
https://arxiv.org/abs/2208.03987; MTP: Wang et al. 2024, https://arxiv.org/abs/2403.13430), any image size.

Parameter for parameter the encoder of MTP's checkpoints without its pyramid: patch 16, absolute positions, no
class token; full attention in a few blocks, in the others windows of 7x7 tokens whose keys and values are
taken at places that each window and head predicts. Where MTP's code and the paper differ this is the code, so
that its weights mean what they meant; what is odd about it is said where it stands.

Shapes: B batch, H/W pixels, h/w tokens, N = h·w, D embedding, n heads, d = D / n, s side of a window,
r/c rows and columns of windows, M = B·r·c windows.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rskernels
from rsmodels.encoders.plain_vit import PlainViT
from rsmodels.encoders.positions import (
    global_tables,
    resize_position_embedding,
    resize_relative_tables,
    saved_grid,
)
from rsmodels.encoders.rvsa_weights import load_rvsa
from rsmodels.layers import FeedForward, LayerNorm, Linear
from rsmodels.registry import register_encoder
from rsmodels.weights import LoadReport

PATCH_SIZE = 16


class RVSAViT(PlainViT):
    """images (B, 3, H, W) → tokens (B, N, D) after the final norm.

    MTP itself taps blocks raw (3, 5, 7, 11 of ViT-B; 7, 11, 15, 23 of ViT-L) and never runs the final norm.

    Args:
        embed_dim, depth, num_heads: of the transformer.
        global_blocks: indices of the blocks that attend over the whole grid.
        image_size: H and W (or one int for both), multiples of 16; the size of every input.
        window_size: side of the other blocks' windows, in tokens.
    """

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        global_blocks: Sequence[int],
        *,
        image_size: int | tuple[int, int] = 512,
        window_size: int = 7,
    ) -> None:
        if window_size < 2:
            raise ValueError(f"window_size={window_size}: expected a side of at least 2 tokens; MTP's is 7")
        super().__init__(embed_dim, image_size=image_size, patch_size=PATCH_SIZE)
        self.global_blocks = tuple(global_blocks)

        self.pos_embed = nn.Parameter(torch.empty(1, self.grid_size[0] * self.grid_size[1], embed_dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads=num_heads,
                grid_size=self.grid_size,
                window_size=0 if i in self.global_blocks else window_size,
                residual_scale=(2 * (i + 1)) ** -0.5,
            )
            for i in range(depth)
        )
        self.norm = LayerNorm(embed_dim)

    def to_tokens(self, patches: Tensor) -> Tensor:
        return patches.flatten(1, 2) + self.pos_embed

    def resize_state(
        self, state: dict[str, Tensor], prefix: str = "", *, saved_size: Sequence[int] | None = None
    ) -> dict[str, str]:
        """Fit the position tables in `state` to this image size, in place; the changed keys, each with how.

        Position embeddings and the global blocks' relative tables are resized bicubically, as MTP does before
        fine-tuning; window tables never depend on the image size.

        saved_size: H and W of the images that the state is for, in pixels. Tables of a global block tell
            the grid of its positions; where the state has none this does, or else it has to be a square.
        """
        changed = {}
        tables = global_tables(prefix, self.global_blocks, self.grid_size)
        lengths = [len(state[key]) for key in tables if key in state]
        told = (lengths[0] // 2 + 1, lengths[1] // 2 + 1) if len(lengths) >= 2 else None
        key = f"{prefix}pos_embed"
        if key in state and state[key].ndim == 3:
            grid = saved_grid(key, state[key], patch_size=PATCH_SIZE, saved_size=saved_size, tables=told)
            if grid != self.grid_size:
                changed[key] = "{}x{} → {}x{} tokens, bicubic".format(*grid, *self.grid_size)
                state[key] = resize_position_embedding(state[key], grid, self.grid_size)
        return changed | resize_relative_tables(state, tables, "bicubic")

    def load_pretrained(self, source: str) -> LoadReport:
        """Load the encoder of an MTP or RVSA checkpoint (a file or a hub id); print and return the report."""
        return load_rvsa(self, source)


class Block(nn.Module):
    """Pre-norm transformer block: (B, N, D) → (B, N, D).

    residual_scale: of the initial weights of the two projections that the residual stream receives, BEiT's
        (2·layer)^-1/2.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        grid_size: tuple[int, int],
        window_size: int,
        residual_scale: float,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn: WindowAttention | GlobalAttention = (
            WindowAttention(dim, num_heads=num_heads, grid_size=grid_size, window_size=window_size)
            if window_size
            else GlobalAttention(dim, num_heads=num_heads, grid_size=grid_size)
        )
        self.norm2 = LayerNorm(dim)
        self.mlp = FeedForward(dim)
        for linear in (self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        with torch.no_grad():
            self.attn.proj.weight.mul_(residual_scale)
            self.mlp.fc2.weight.mul_(residual_scale)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GlobalAttention(nn.Module):
    """Multi-head attention over the whole grid with decomposed relative positions: (B, N, D) → (B, N, D)."""

    def __init__(self, dim: int, *, num_heads: int, grid_size: tuple[int, int]) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.grid_size = grid_size
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * grid_size[0] - 1, dim // num_heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * grid_size[1] - 1, dim // num_heads))

    def forward(self, x: Tensor) -> Tensor:
        # MTP scales the queries before it multiplies them with the tables; in its windows, as in SAM, the
        # tables meet unscaled queries.
        x = rskernels.rel_pos_attention(
            self.qkv(x).unflatten(1, self.grid_size),
            self.scale * self.rel_pos_h,
            self.scale * self.rel_pos_w,
            num_heads=self.num_heads,
            scale=self.scale,
        )
        return self.proj(x.flatten(1, 2))


class WindowAttention(nn.Module):
    """Rotated varied-size window attention: (B, N, D) → (B, N, D).

    The queries of a window attend to s·s keys and values, read from the map of their head at the window's own
    places, which are scaled, rotated and moved as the window's mean token says. The scores get decomposed
    relative positions and Swin's bias table, by the places before they were moved.
    """

    def __init__(self, dim: int, *, num_heads: int, grid_size: tuple[int, int], window_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.grid_size = grid_size
        self.window_size = window_size
        self.windows = (-(-grid_size[0] // window_size), -(-grid_size[1] // window_size))
        # Rows and columns of padding at the top and left: half of all, the odd one goes to the other side.
        self.corner = (-grid_size[0] % window_size // 2, -grid_size[1] % window_size // 2)
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        # With PyTorch's initial values, as in MTP's code: windows do not start where they stand.
        self.sampling_offsets = Linear(dim, 2 * num_heads)
        self.sampling_scales = Linear(dim, 2 * num_heads)
        self.sampling_angles = Linear(dim, num_heads)
        table = 2 * window_size - 1
        self.rel_pos_h = nn.Parameter(torch.zeros(table, dim // num_heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(table, dim // num_heads))
        self.relative_position_bias_table = nn.Parameter(torch.empty(table * table, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, self.grid_size)
        q, kv = self.qkv(x).tensor_split((x.shape[-1],), dim=-1)
        q_MnNd = self.to_windows(self.pad(q)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k_MnNd, v_MnNd = self.sample(kv, self.places(self.pad(x)))
        out = F.scaled_dot_product_attention(q_MnNd, k_MnNd, v_MnNd, attn_mask=self.bias(q_MnNd))
        (h, w), (top, left) = self.grid_size, self.corner
        out = self.from_windows(out.transpose(1, 2).flatten(2))[:, top : top + h, left : left + w]
        return self.proj(out.flatten(1, 2))

    def places(self, x: Tensor) -> Tensor:
        """Padded tokens (B, r·s, c·s, D) → where each window and head has its keys: (B, r, c, n, s, s, 2) as
        (x, y), (0, 0) and (1, 1) the outer corners of the grid without its padding. float32 at least: half
        precision would miss a token."""
        (rows, columns), (h, w), s = self.windows, self.grid_size, self.window_size
        dtype = torch.promote_types(x.dtype, torch.float32)
        # The mean counts the padding, as it does in MTP.
        mean = x.unflatten(2, (columns, s)).unflatten(1, (rows, s)).mean((2, 4), dtype=dtype)
        mean = F.leaky_relu(mean)
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            move_x, move_y = self.sampling_offsets(mean).unflatten(-1, (-1, 2))[..., None, None].unbind(-3)
            scale_x, scale_y = self.sampling_scales(mean).unflatten(-1, (-1, 2))[..., None, None].unbind(-3)
            angle = self.sampling_angles(mean)[..., None, None]

        steps = torch.arange(s, device=x.device, dtype=dtype) - (s - 1) / 2
        x_scaled, y_scaled = (1 + scale_x) * steps, (1 + scale_y) * steps[:, None]
        # MTP turns coordinates that run from -1 to 1 along both sides of the padded grid: where that is no
        # square, a turn also stretches.
        span_y, span_x = rows * s - 1, columns * s - 1
        x_turned = x_scaled * angle.cos() - y_scaled * angle.sin() * (span_x / span_y)
        y_turned = y_scaled * angle.cos() + x_scaled * angle.sin() * (span_y / span_x)
        # In these coordinates it divides moves along x by the whole windows from top to bottom, and moves
        # along y by those from left to right. Where there is none it divides by zero; here by one.
        x_moved = x_turned + move_x * (span_x / 2 / max(h // s, 1))
        y_moved = y_turned + move_y * (span_y / 2 / max(w // s, 1))
        top, left = self.corner
        middle_y = s * torch.arange(rows, device=x.device, dtype=dtype) + ((s - 1) / 2 - top)
        middle_x = s * torch.arange(columns, device=x.device, dtype=dtype) + ((s - 1) / 2 - left)
        x_found = middle_x[:, None, None, None] + x_moved
        y_found = middle_y[:, None, None, None, None] + y_moved
        return torch.stack([(x_found + 0.5) / w, (y_found + 0.5) / h], dim=-1)

    def sample(self, kv: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, h, w, 2·D), interpolated at the places: (M, n, s·s, d) each.

        MTP pads keys and values (not what they are made of) with zeros. Nothing need be padded for that:
        outside of the grid is zero as well.
        """
        # (B, queries, heads, levels, points, 2): the same for a head's keys and its values.
        places = places.flatten(4, 5).transpose(3, 4).flatten(1, 3).repeat(1, 1, 2, 1)[..., None, None, :]
        weights = places.new_ones(places.shape[:-1])
        value = kv.flatten(1, 2).unflatten(-1, (2 * self.num_heads, -1))
        sampled = rskernels.deformable_attention(value, [self.grid_size], places, weights)
        kv = sampled.reshape(-1, self.window_size**2, 2, self.num_heads, value.shape[-1])
        k_MnNd, v_MnNd = kv.permute(2, 0, 3, 1, 4).unbind(0)
        return k_MnNd, v_MnNd

    def bias(self, q_MnNd: Tensor) -> Tensor:
        """What is added to the scores: (M, n, s·s, s·s)."""
        s = self.window_size
        steps = torch.arange(s, device=q_MnNd.device)
        offsets = steps[:, None] - steps + s - 1  # of query i and key j
        q = q_MnNd.unflatten(2, (s, s))
        bias_h = torch.einsum("mnhwd,hkd->mnhwk", q, self.rel_pos_h.to(q.dtype)[offsets])
        bias_w = torch.einsum("mnhwd,wkd->mnhwk", q, self.rel_pos_w.to(q.dtype)[offsets])
        table = self.relative_position_bias_table.unflatten(0, (2 * s - 1, -1)).permute(2, 0, 1).to(q.dtype)
        table_nhwkl = table[:, offsets[:, None, :, None], offsets[None, :, None, :]]
        return (bias_h[..., :, None] + bias_w[..., None, :] + table_nhwkl).flatten(4, 5).flatten(2, 3)

    def pad(self, x: Tensor) -> Tensor:
        """(B, h, w, C) → (B, r·s, c·s, C), with zeros."""
        (top, left), s = self.corner, self.window_size
        bottom, right = -x.shape[1] % s - top, -x.shape[2] % s - left
        return F.pad(x, (0, 0, left, right, top, bottom))

    def to_windows(self, x: Tensor) -> Tensor:
        """(B, r·s, c·s, C) → (M, s·s, C)."""
        s = self.window_size
        x = x.unflatten(2, (-1, s)).unflatten(1, (-1, s)).transpose(2, 3)
        return x.flatten(0, 2).flatten(1, 2)

    def from_windows(self, x: Tensor) -> Tensor:
        """(M, s·s, C) → (B, r·s, c·s, C)."""
        s = self.window_size
        x = x.unflatten(1, (s, s)).unflatten(0, (-1, *self.windows)).transpose(2, 3)
        return x.flatten(3, 4).flatten(1, 2)


@register_encoder
def rvsa_vit_b(*, image_size: int | tuple[int, int] = 512, **options: Any) -> RVSAViT:
    """MTP's ViT-B with RVSA: 12 blocks of width 768."""
    return RVSAViT(768, 12, 12, (2, 5, 8, 11), image_size=image_size, **options)


@register_encoder
def rvsa_vit_l(*, image_size: int | tuple[int, int] = 512, **options: Any) -> RVSAViT:
    """MTP's ViT-L with RVSA: 24 blocks of width 1024."""
    return RVSAViT(1024, 24, 16, (5, 11, 17, 23), image_size=image_size, **options)


@register_encoder
def rvsa_vit_tiny(*, image_size: int | tuple[int, int] = 128, **options: Any) -> RVSAViT:
    """The same encoder small enough to train from scratch on a CPU; no pretrained weights are published."""
    return RVSAViT(128, 4, 4, (1, 3), image_size=image_size, **{"window_size": 4, **options})
