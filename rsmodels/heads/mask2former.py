"""Mask2Former's head (Cheng et al. 2022, https://arxiv.org/abs/2112.01527) on any encoder with four maps.

Queries gather, layer by layer, what lies under the mask that they predicted so far; each predicts a class and
a mask. Attention runs through rskernels.cross_attention, the pixel decoder (rsmodels.heads.pixel_decoder)
through rskernels.deformable_attention. The losses are rsmodels.methods.mask_losses.

Shapes: B batch, C_i channels of level i, D width, Q queries, K classes, h/w the finest level's pixels, H/W
image pixels, M pixels of the level that a layer attends to.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rsmodels.arguments import check_numbers
from rsmodels.heads.pixel_decoder import LEVELS, NORM_GROUPS, PixelDecoder, sine_position_encoding, to_tokens
from rsmodels.heads.sam_decoder import Attention
from rsmodels.layers import MLP, LayerNorm, Linear, resize

SCORED_AT_ONCE = 16  # queries whose masks semantic_scores holds at full size


class Mask2FormerOutput(NamedTuple):
    """What every decoder stage predicts: first the queries alone, then each layer; the last is the result.

    classes: logits (B, Q, K + 1), the last one for "no object". masks: logits (B, Q, h, w).
    """

    classes: list[Tensor]
    masks: list[Tensor]


class Mask2FormerHead(nn.Module):
    """Four maps (B, C_i, ·, ·) at strides 4, 8, 16 and 32, finest first → Mask2FormerOutput.

    Args:
        in_channels: C_i.
        num_classes: K.
        num_queries: Q of the head's own query embeddings; None: it has none, and `forward` is given them (an
            embedding that no loss reaches would stop DistributedDataParallel).
        dim: D; a multiple of 4, of `num_heads` and of `norm_groups`.
        num_heads: of every attention.
        encoder_layers, encoder_mlp_dim, num_points: of the pixel decoder.
        decoder_layers, decoder_mlp_dim: of the transformer decoder; the layers take the levels at 1/32, 1/16
            and 1/8 in turn.
        norm_groups: of the pixel decoder's normalisations.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        num_queries: int | None = 100,
        dim: int = 256,
        num_heads: int = 8,
        encoder_layers: int = 6,
        encoder_mlp_dim: int = 1024,
        num_points: int = 4,
        decoder_layers: int = 9,
        decoder_mlp_dim: int = 2048,
        norm_groups: int = NORM_GROUPS,
    ) -> None:
        super().__init__()
        check_numbers(1, num_queries=num_queries, num_heads=num_heads, num_points=num_points)
        # Without a layer of either kind its level embedding would have no gradient.
        check_numbers(1, encoder_layers=encoder_layers, encoder_mlp_dim=encoder_mlp_dim)
        check_numbers(1, decoder_layers=decoder_layers, decoder_mlp_dim=decoder_mlp_dim)
        self.dim = dim
        self.num_classes = num_classes
        self.pixel_decoder = PixelDecoder(
            in_channels,
            dim=dim,
            num_layers=encoder_layers,
            num_heads=num_heads,
            num_points=num_points,
            mlp_dim=encoder_mlp_dim,
            norm_groups=norm_groups,
        )
        if num_queries is None:
            self.query_position = self.query_features = None
        else:
            self.query_position = nn.Parameter(torch.randn(num_queries, dim))
            self.query_features = nn.Parameter(torch.randn(num_queries, dim))
        self.level_embed = nn.Parameter(torch.randn(LEVELS, dim))
        self.layers = nn.ModuleList(
            MaskedAttentionLayer(dim, num_heads=num_heads, mlp_dim=decoder_mlp_dim)
            for _ in range(decoder_layers)
        )
        self.norm = LayerNorm(dim, eps=1e-5)
        self.class_predictor = Linear(dim, num_classes + 1)
        self.mask_mlp = nn.Sequential(
            Linear(dim, dim, activation="relu"), Linear(dim, dim, activation="relu"), Linear(dim, dim)
        )

    def forward(
        self,
        features: Sequence[Tensor],
        queries: tuple[Tensor, Tensor] | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> Mask2FormerOutput:
        """Predict.

        Args:
            features: the four maps; their sizes need not be exact halves of each other.
            queries: (position, features) of the queries, each (Q, D); None: the head's own.
            sizes: h and w of the four levels where the maps still have others, as those of a plain ViT do:
                they are then resized to them, bilinearly. None: the maps have their sizes.
        """
        position, start = self._queries(queries)
        mask_features, levels = self.pixel_decoder(features, sizes)
        grids = [(level.shape[-2], level.shape[-1]) for level in levels]
        values = [to_tokens(x) + e.to(x.dtype) for x, e in zip(levels, self.level_embed, strict=True)]
        keys = [
            value + sine_position_encoding(size, self.dim, value.device).to(value.dtype)
            for value, size in zip(values, grids, strict=True)
        ]
        output = Mask2FormerOutput([], [])
        tokens = start.expand(mask_features.shape[0], -1, -1)
        self._predict(tokens, mask_features, output)
        for index, layer in enumerate(self.layers):
            level = index % LEVELS
            mask = attention_mask(output.masks[-1], grids[level])
            tokens = layer(tokens, position, keys[level], values[level], mask)
            self._predict(tokens, mask_features, output)
        return output

    def _predict(self, tokens: Tensor, mask_features: Tensor, output: Mask2FormerOutput) -> None:
        """Append what the queries `tokens` (B, Q, D) predict."""
        tokens = self.norm(tokens)
        output.classes.append(self.class_predictor(tokens))
        masks = self.mask_mlp(tokens) @ mask_features.flatten(2)
        output.masks.append(masks.unflatten(2, mask_features.shape[-2:]))

    def _queries(self, given: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        if given is None:
            if self.query_position is None or self.query_features is None:
                raise ValueError(
                    "queries=None: expected (position, features), as this head was created with "
                    "num_queries=None and has no embeddings of its own"
                )
            return self.query_position, self.query_features
        position, features = given
        if position.shape != features.shape or position.dim() != 2 or position.shape[1] != self.dim:
            raise ValueError(
                f"queries of shapes {tuple(position.shape)} and {tuple(features.shape)}: expected position "
                f"and features, each (Q, {self.dim})"
            )
        return position, features


class MaskedAttentionLayer(nn.Module):
    """Queries attend to pixels under their masks, then to each other; MLP; post-norm: (B, Q, D) → same."""

    def __init__(self, dim: int, *, num_heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.cross_attention = Attention(dim, num_heads=num_heads)
        self.cross_norm = LayerNorm(dim, eps=1e-5)
        self.self_attention = Attention(dim, num_heads=num_heads)
        self.self_norm = LayerNorm(dim, eps=1e-5)
        self.mlp = MLP(dim, mlp_dim, activation="relu")
        self.mlp_norm = LayerNorm(dim, eps=1e-5)
        self._init_weights()

    def forward(self, tokens: Tensor, position: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """`position` (Q, D), `keys` and `values` (B, M, D), `mask` (B, Q, M), True = attend."""
        attended = self.cross_attention(tokens + position, keys, values, mask)
        tokens = self.cross_norm(tokens + attended)
        placed = tokens + position
        tokens = self.self_norm(tokens + self.self_attention(placed, placed, tokens))
        return self.mlp_norm(tokens + self.mlp(tokens))

    def _init_weights(self) -> None:
        """The authors' first weights: Xavier throughout."""
        for attention in (self.cross_attention, self.self_attention):
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                # Theirs is one matrix (3·D, D).
                nn.init.xavier_uniform_(projection.weight, gain=0.5**0.5)
                nn.init.zeros_(projection.bias)
            nn.init.xavier_uniform_(attention.out_proj.weight)
            nn.init.zeros_(attention.out_proj.bias)
        for linear in (self.mlp.lin1, self.mlp.lin2):
            nn.init.xavier_uniform_(linear.weight)


def attention_mask(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Mask logits (B, Q, h, w) → where each query attends on a level of `size`: (B, Q, M) bool, without
    gradient. A query that attends nowhere attends everywhere, by rskernels.cross_attention's rule."""
    return (resize(masks.detach(), size) >= 0).flatten(2)


def semantic_scores(output: Mask2FormerOutput, size: Sequence[int]) -> Tensor:
    """Σ over the queries of softmax(class) · sigmoid(mask), "no object" left out: (B, K, H, W), at least 0.

    Args:
        output: of Mask2FormerHead; its last stage is taken.
        size: H and W, to which the mask logits are resized.

    In float32, also under autocast. Some queries' masks at a time have the full size, in inference.
    """
    classes, masks = output.classes[-1], output.masks[-1]
    dtype = torch.promote_types(masks.dtype, torch.float32)
    with torch.autocast(masks.device.type, enabled=False):
        probabilities = classes.to(dtype).softmax(dim=-1)[..., :-1]
        parts = zip(
            probabilities.split(SCORED_AT_ONCE, dim=1), masks.split(SCORED_AT_ONCE, dim=1), strict=True
        )
        scores = torch.zeros((), dtype=dtype, device=masks.device)
        for p_bqk, mask_bqhw in parts:
            inside = resize(mask_bqhw.to(dtype), size).sigmoid().flatten(2)
            scores = scores + p_bqk.transpose(1, 2) @ inside
        return scores.unflatten(2, tuple(size))
