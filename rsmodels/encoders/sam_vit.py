"""SAM's image encoder (Kirillov et al. 2023, https://arxiv.org/abs/2304.02643), for any image size.

Parameter for parameter the `image_encoder` of the official checkpoints: a plain ViT with patch 16, absolute
position embedding, decomposed relative positions in every block, attention in 14x14 windows except in a few
global blocks. With `lora_rank` the q and v parts of every qkv carry a LoRA update (Zhang & Liu 2023,
SAMed, https://arxiv.org/abs/2304.13785).

Shapes: B batch, H/W pixels, h/w tokens, D embedding, d head dim.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import rskernels
from rskernels.library import autocast_dtype
from rsmodels.encoders.plain_vit import PlainViT
from rsmodels.encoders.positions import global_tables, resize_position_embedding, resize_relative_tables
from rsmodels.layers import MLP, LayerNorm, Linear, LoRAQKV, make_neck
from rsmodels.registry import register_encoder
from rsmodels.weights import LoadReport, load_sam_encoder

PATCH_SIZE = 16
IN_CHANS_MODES = ("repeat", "learned")
MLP_ROWS = 1024  # measured: 512 to 2048 within a few per cent; the whole grid of 1024 pixels is 8 % slower


class SamViT(PlainViT):
    """images (B, C, H, W) → (B, neck_dim, h, w), or (B, D, h, w) without a neck.

    Args:
        embed_dim, depth, num_heads: of the transformer.
        global_blocks: indices of the blocks that attend over the whole grid.
        image_size: H and W (or one int for both), multiples of 16; the size of every input.
        window_size: side of the other blocks' windows, in tokens.
        neck_dim: channels of SAM's neck; None leaves the neck out.
        lora_rank: rank of the update on q and v of every qkv; 0 for none.
        in_chans: input bands. Other than 3 needs `in_chans_mode`: "repeat" makes the patch embedding of a
            checkpoint take bands modulo three, scaled to keep its magnitude; "learned" starts it anew and
            trains it even in a frozen encoder.
    """

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        global_blocks: Sequence[int],
        *,
        image_size: int | tuple[int, int] = 1024,
        window_size: int = 14,
        mlp_ratio: float = 4.0,
        neck_dim: int | None = 256,
        lora_rank: int = 0,
        in_chans: int = 3,
        in_chans_mode: str | None = None,
    ) -> None:
        if lora_rank < 0:
            raise ValueError(f"lora_rank={lora_rank}: expected 0 (no LoRA) or a positive rank")
        if in_chans != 3 and in_chans_mode not in IN_CHANS_MODES:
            raise ValueError(
                f"in_chans={in_chans} with in_chans_mode={in_chans_mode!r}: SAM takes 3 bands; "
                "say how to adapt it with in_chans_mode='repeat' or 'learned'"
            )
        super().__init__(embed_dim, image_size=image_size, patch_size=PATCH_SIZE, in_chans=in_chans)
        self.global_blocks = tuple(global_blocks)
        self.in_chans_mode = in_chans_mode

        self.pos_embed = nn.Parameter(torch.empty(1, *self.grid_size, embed_dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads=num_heads,
                grid_size=self.grid_size,
                window_size=0 if i in self.global_blocks else window_size,
                mlp_ratio=mlp_ratio,
                lora_rank=lora_rank,
            )
            for i in range(depth)
        )
        self.norm = nn.Identity()  # what norms the last block's tokens is the neck
        self.neck = None if neck_dim is None else make_neck(embed_dim, neck_dim)

    def forward(self, images: Tensor) -> Tensor:
        x = self.to_map(super().forward(images))
        return x if self.neck is None else self.neck(x)

    def to_tokens(self, patches: Tensor) -> Tensor:
        """Embedded patches (B, h, w, D) with their positions: the blocks work on the grid."""
        return patches + self.pos_embed

    def to_map(self, tokens: Tensor) -> Tensor:
        """Tokens (B, h, w, D) → (B, D, h, w)."""
        return tokens.permute(0, 3, 1, 2)

    def freeze(self) -> None:
        """Leave only LoRA (and a "learned" patch embedding) trainable."""
        for name, parameter in self.named_parameters():
            learned_input = self.in_chans_mode == "learned" and name.startswith("patch_embed.")
            parameter.requires_grad_(".lora_" in name or learned_input)

    def merge_lora(self) -> None:
        """Fold LoRA into every qkv for inference; see LoRAQKV.merge_lora."""
        for qkv in self._lora_layers():
            qkv.merge_lora()

    def unmerge_lora(self) -> None:
        """Undo merge_lora() exactly."""
        for qkv in self._lora_layers():
            qkv.unmerge_lora()

    def _lora_layers(self) -> list[LoRAQKV]:
        return [module for module in self.modules() if isinstance(module, LoRAQKV)]

    def resize_state(self, state: dict[str, Tensor], prefix: str = "") -> dict[str, str]:
        """Fit the position tables in `state` to this image size, in place; the changed keys, each with how.

        The position embedding is resized bicubically, the global blocks' relative tables linearly; window
        tables never depend on the image size.
        """
        changed = {}
        key = f"{prefix}pos_embed"
        if key in state and state[key].ndim == 4 and state[key].shape[1:3] != self.grid_size:
            h, w = state[key].shape[1:3]
            changed[key] = "{}x{} → {}x{} tokens, bicubic".format(h, w, *self.grid_size)
            # Antialiased, as timm does.
            resized = resize_position_embedding(
                state[key].flatten(1, 2), (h, w), self.grid_size, antialias=True
            )
            state[key] = resized.unflatten(1, self.grid_size)
        # As SAM's get_rel_pos does at run time.
        tables = global_tables(prefix, self.global_blocks, self.grid_size)
        return changed | resize_relative_tables(state, tables, "linear")

    def adapt_input_weight(self, weight: Tensor) -> Tensor:
        """A checkpoint's patch embedding (D, 3, p, p), its bands repeated in turn to fill `in_chans`."""
        if weight.shape[1] == self.in_chans or weight.shape[1] != 3:
            return weight
        return weight[:, torch.arange(self.in_chans) % 3] * (3 / self.in_chans)

    def load_pretrained(self, source: str) -> LoadReport:
        """Load the image encoder of a SAM checkpoint (a file or a hub id); see rsmodels.weights."""
        return load_sam_encoder(self, source)


class Block(nn.Module):
    """Pre-norm transformer block over a token grid: (B, h, w, D) → (B, h, w, D)."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        grid_size: tuple[int, int],
        window_size: int,
        mlp_ratio: float,
        lora_rank: int,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(
            dim, num_heads=num_heads, grid_size=grid_size, window_size=window_size, lora_rank=lora_rank
        )
        self.norm2 = LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio), activation="gelu")

    def forward(self, x: Tensor) -> Tensor:
        # Under autocast the norms write what the products behind them read.
        dtype = autocast_dtype(x)
        x = add_residual(self.attn(self.norm1(x, dtype)), x)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != "cpu":
            return add_residual(self.mlp(self.norm2(x, dtype)), x)
        # x is ours alone: in place, and by rows, so that the hidden layer stays in the cache. The whole of it
        # would be fresh memory in every call.
        for rows in x.view(-1, x.shape[-1]).split(MLP_ROWS):
            rows += self.mlp(self.norm2(rows, dtype))
        return x


def add_residual(update: Tensor, x: Tensor) -> Tensor:
    """x + update, contiguous; in the memory of `update`, a projection's output that nobody else reads, where
    the dtypes agree (under autocast the tokens stay in float32)."""
    return update.add_(x) if update.dtype == x.dtype else update + x


class Attention(nn.Module):
    """Multi-head attention with decomposed relative positions, global (window_size 0) or in windows."""

    def __init__(
        self, dim: int, *, num_heads: int, grid_size: tuple[int, int], window_size: int, lora_rank: int
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.qkv = LoRAQKV(dim, rank=lora_rank) if lora_rank else Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        height, width = (window_size, window_size) if window_size else grid_size
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * height - 1, dim // num_heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * width - 1, dim // num_heads))

    def forward(self, x: Tensor) -> Tensor:
        # SAM pads the grid with zeros after norm1, so padded tokens are keys and values equal to the qkv
        # bias, and they are attended to. LoRA adds nothing to them: their input is zero.
        x = rskernels.rel_pos_attention(
            self.qkv(x),
            self.rel_pos_h,
            self.rel_pos_w,
            num_heads=self.num_heads,
            window_size=self.window_size,
            pad_qkv=self.qkv.bias if self.window_size else None,
        )
        return self.proj(x)


@register_encoder
def sam_vit_b(*, image_size: int | tuple[int, int] = 1024, **options: Any) -> SamViT:
    """SAM ViT-B: 12 blocks of width 768."""
    return SamViT(768, 12, 12, (2, 5, 8, 11), image_size=image_size, **options)


@register_encoder
def sam_vit_l(*, image_size: int | tuple[int, int] = 1024, **options: Any) -> SamViT:
    """SAM ViT-L: 24 blocks of width 1024."""
    return SamViT(1024, 24, 16, (5, 11, 17, 23), image_size=image_size, **options)


@register_encoder
def sam_vit_h(*, image_size: int | tuple[int, int] = 1024, **options: Any) -> SamViT:
    """SAM ViT-H: 32 blocks of width 1280."""
    return SamViT(1280, 32, 16, (7, 15, 23, 31), image_size=image_size, **options)


@register_encoder
def sam_vit_tiny(*, image_size: int | tuple[int, int] = 128, **options: Any) -> SamViT:
    """The same encoder small enough to train from scratch on a CPU; no pretrained weights exist."""
    return SamViT(128, 4, 4, (1, 3), image_size=image_size, **{"window_size": 4, "neck_dim": 64, **options})
