"""What the plain vision transformers share: patches and positions in, blocks one after the other, maps out.

Shapes: B batch, C bands, H/W pixels, h/w patches, P prefix tokens (class token, registers), N = P + h·w
tokens, D embedding.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rsmodels.encoders.features import FeatureBackbone
from rsmodels.layers import PatchEmbed, check_images, image_size_pair


class PlainViT(nn.Module, ABC):
    """images (B, C, H, W) → tokens (B, N, D) after the final norm.

    A subclass brings its position embedding, `blocks` and `norm`, and `to_tokens`. Where its blocks take
    another form of tokens than a sequence it has its own `to_map` as well.

    Args:
        embed_dim: D.
        image_size: H and W (or one int for both), multiples of the patch size; the size of every input.
        patch_size: side of a patch, in pixels.
        in_chans: C.
        prefix_tokens: P.
    """

    blocks: nn.ModuleList
    norm: nn.Module

    def __init__(
        self,
        embed_dim: int,
        *,
        image_size: int | tuple[int, int],
        patch_size: int,
        in_chans: int = 3,
        prefix_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.image_size = image_size_pair(image_size, multiple_of=patch_size)
        self.grid_size = (self.image_size[0] // patch_size, self.image_size[1] // patch_size)
        self.embed_dim, self.patch_size, self.in_chans = embed_dim, patch_size, in_chans
        self.prefix_tokens = prefix_tokens
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size)
        self.activation_checkpointing = False

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        for block in self.blocks:
            x = self.run_block(block, x)
        return self.norm(x)

    def embed(self, images: Tensor) -> Tensor:
        """What enters the first block: (B, N, D)."""
        check_images(images, self.in_chans, self.image_size)
        return self.to_tokens(self.patch_embed(images))

    @abstractmethod
    def to_tokens(self, patches: Tensor) -> Tensor:
        """Embedded patches (B, h, w, D) → tokens (B, N, D), with their positions and the prefix."""

    def to_map(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, D) → the map (B, D, h, w) of their patches."""
        return tokens[:, self.prefix_tokens :].transpose(1, 2).unflatten(2, self.grid_size)

    def run_block(self, block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`block(x)`, recomputed in backward where activation checkpointing is on."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)

    def forward_intermediates(
        self,
        images: Tensor,
        indices: Sequence[int],
        *,
        normed: Sequence[int] = (),
        after_block: Callable[[Tensor, int], Tensor] | None = None,
    ) -> list[Tensor]:
        """The maps (B, D, h, w) after the blocks `indices` (ascending); no later block runs.

        normed: those of the indices whose map is to pass the final norm (Meta's own use of DINOv2 norms every
            map, the papers of this library the last one or none).
        after_block: what to make of the tokens after every block, given its index, before they are taken as
            features and go on to the next one; recomputed with the block under activation checkpointing.
        """
        x = self.embed(images)
        features = []
        for i, block in enumerate(self.blocks):
            x = self.run_block(block if after_block is None else _followed(block, after_block, i), x)
            if i in indices:
                features.append(self.to_map(self.norm(x) if i in normed else x))
            if i == indices[-1]:
                break
        return features

    def features_only(self, out_indices: Sequence[int]) -> FeatureBackbone:
        """This encoder as a timm-like backbone of raw maps; see rsmodels.create_backbone."""
        self.norm = nn.Identity()  # every parameter left is used
        return FeatureBackbone(self, out_indices, reduction=self.patch_size)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute each block's activations in backward instead of keeping them."""
        self.activation_checkpointing = enabled


def _followed(
    block: nn.Module, after_block: Callable[[Tensor, int], Tensor], index: int
) -> Callable[[Tensor], Tensor]:
    return lambda x: after_block(block(x), index)
