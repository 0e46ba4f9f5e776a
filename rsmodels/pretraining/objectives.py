"""What an encoder learns from unlabelled images: which patches of two views show the same ground, to fill in
masked pixels, or to predict its own features.

All work on the tokens of any encoder that has `forward_intermediates`, and hide patches, where they do, in
the image itself. Their heads normalise tokens without a scale of their own: that is what a final norm at its
start does, which DINOv2's then still is.

Shapes: B batch, H/W pixels, p patch size, h/w = (H, W) / p the token grid, D embedding, V views, N patches.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsmodels.pretraining.scenes import SHIFT, Views

MASKED = 0.6  # share of the patches that are hidden
MASK_BLOCK = 2  # patches that are hidden together, along an axis: one alone is guessed from its neighbours
VARIANCE_FLOOR = 0.01  # of normalised pixels: what varies less is the sensor's noise, not worth predicting
AVERAGED = (0.99, 0.999)  # the moving average's memory, at the first and the last step
TEMPERATURE = 0.5  # of the contrast: softer than usual, as neighbours often show the same thing
CONTRAST_DIM = 64


class Contrast(nn.Module):
    """Contrast of patches (InfoNCE, van den Oord et al. 2018, https://arxiv.org/abs/1807.03748, per patch as
    DenseCL, Wang et al. 2021, https://arxiv.org/abs/2011.09157), between the seasons and sensors of one place
    (SeCo, Mañas et al. 2021, https://arxiv.org/abs/2103.16607).

    A patch is to be told, among all patches of the other views of the batch, by its features: which patch
    shows the same ground. What season, sensor and position change is no help; what is on the ground is. Every
    block learns so, through a head of its own, as whoever builds on the encoder takes features of several.

    forward: two `Views`, normalised; the mask is not used → mean cross-entropy over blocks, both ways.
    """

    views = 2

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        dim = encoder.embed_dim
        self.heads = nn.ModuleList(projection(dim, CONTRAST_DIM) for _ in encoder.blocks)

    def forward(self, views: Views, mask: Tensor) -> Tensor:
        blocks = range(len(self.heads))
        per_view = [encoded(self.encoder, images, blocks) for images in views.images]
        losses = []
        for head, *maps in zip(self.heads, *per_view, strict=True):
            first, second = (
                F.normalize(head(normed(tokens)).float().flatten(0, 2), dim=-1)
                for tokens in overlap(maps, views.corners)
            )
            scores = first @ second.T / TEMPERATURE
            answers = torch.arange(len(scores), device=scores.device)
            losses.append(F.cross_entropy(scores, answers) + F.cross_entropy(scores.T, answers))
        return torch.stack(losses).mean() / 2

    def after_step(self, progress: float) -> None:
        """Nothing to do."""

    def learned(self) -> Any:
        """The encoder whose weights are the result."""
        return self.encoder


class MaskedImages(nn.Module):
    """Masked image modelling (SimMIM, Xie et al. 2022, https://arxiv.org/abs/2111.09886, with the per-patch
    normalisation of MAE, He et al. 2022, https://arxiv.org/abs/2111.06377).

    forward: one view (B, 3, H, W), normalised, and the mask (B, h, w) → mean squared error of the hidden
    patches' pixels, each patch with mean 0 and variance 1.
    """

    views = 1

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.hide = Hide(encoder)
        patch = self.hide.patch_size
        self.head = nn.Linear(encoder.embed_dim, 3 * patch * patch)

    def forward(self, views: Views, mask: Tensor) -> Tensor:
        (images,) = views.images
        tokens = normed(encoded(self.encoder, self.hide(images, mask))[-1])
        return F.mse_loss(self.head(tokens[mask]).float(), self.targets(images)[mask])

    def targets(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, h, w, 3·p²), normalised per patch."""
        patch = self.hide.patch_size
        patches_bchywx = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
        patches = patches_bchywx.permute(0, 2, 4, 1, 3, 5).flatten(3)
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return (patches - mean) * (variance + VARIANCE_FLOOR).rsqrt()

    def after_step(self, progress: float) -> None:
        """Nothing to do."""

    def learned(self) -> Any:
        """The encoder whose weights are the result."""
        return self.encoder


class Distillation(nn.Module):
    """Self-distillation in the manner of data2vec (Baevski et al. 2022, https://arxiv.org/abs/2202.03555) and
    BYOL (Grill et al. 2020, https://arxiv.org/abs/2006.07733).

    From a view with hidden patches the encoder predicts, in every patch that both views show, the features
    that a moving average of itself has of the whole of the other: the same place in another season and other
    colours, perhaps in other bands. Features that follow the colours cannot be predicted; those that follow
    the place can. Targets are centred per position and scaled per channel over the batch, so that neither a
    constant nor the position alone is an answer.

    forward: two `Views`, normalised, and the mask (B, h, w) of the first → mean squared error.
    """

    views = 2

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.average = copy.deepcopy(encoder).requires_grad_(False)
        self.hide = Hide(encoder)
        self.head = projection(encoder.embed_dim, encoder.embed_dim)

    def forward(self, views: Views, mask: Tensor) -> Tensor:
        seen, other = views.images
        tokens = normed(encoded(self.encoder, self.hide(seen, mask))[-1])
        ours, theirs = overlap([self.head(tokens).float(), self.targets(other)], views.corners)
        return F.mse_loss(ours, theirs)

    @torch.no_grad()
    def targets(self, images: Tensor) -> Tensor:
        """(B, h, w, D): the upper half of the average's blocks, normalised, their mean, standardised."""
        depth = len(self.average.blocks)
        maps = encoded(self.average, images, range(depth // 2, depth))
        features = torch.stack([normed(tokens.float()) for tokens in maps]).mean(0)
        features = features - features.mean(0)
        return features * (features.square().mean((0, 1, 2)) + 1e-6).rsqrt()

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Let the average follow; `progress` runs from 0 to 1."""
        start, end = AVERAGED
        share = 1 - (start + (end - start) * progress)
        for average, now in zip(self.average.parameters(), self.encoder.parameters(), strict=True):
            average.lerp_(now, share)

    def learned(self) -> Any:
        """The encoder whose weights are the result."""
        return self.average


OBJECTIVES: dict[str, type[Contrast] | type[MaskedImages] | type[Distillation]] = {
    "contrast": Contrast,
    "mim": MaskedImages,
    "distill": Distillation,
}


class Hide(nn.Module):
    """Replace the masked patches of images (B, 3, H, W) by one learned patch."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.grid_size: tuple[int, int] = encoder.grid_size
        self.patch_size = patch_size(encoder)
        self.patch = nn.Parameter(torch.zeros(3, self.patch_size, self.patch_size))

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        pixels = mask.repeat_interleave(self.patch_size, 1).repeat_interleave(self.patch_size, 2)
        return torch.where(pixels[:, None], self.patch.repeat(1, *self.grid_size).to(images.dtype), images)


def patch_size(encoder: Any) -> int:
    """Pixels of a patch's side; ValueError where an image has too few patches to hide or to shift some."""
    size: int = encoder.image_size[0] // encoder.grid_size[0]
    if min(encoder.grid_size) <= max(MASK_BLOCK, SHIFT):
        raise ValueError(
            f"--image-size {min(encoder.image_size)}: too small to learn from patches of {size} pixels; give "
            f"at least {(max(MASK_BLOCK, SHIFT) + 1) * size}"
        )
    return size


def projection(dim: int, out: int) -> nn.Module:
    """The head of one hidden layer between features and what is asked of them."""
    return nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, out))


def overlap(maps: list[Tensor], corners: list[tuple[int, int]]) -> list[Tensor]:
    """The part of every map (B, h, w, ·) that all views show; corners: see `Views`."""
    height, width = maps[0].shape[1:3]
    top, left = (max(corner[axis] for corner in corners) for axis in (0, 1))
    bottom = min(row for row, _ in corners) + height
    right = min(column for _, column in corners) + width
    return [
        tokens[:, top - row : bottom - row, left - column : right - column]
        for tokens, (row, column) in zip(maps, corners, strict=True)
    ]


def draw_masks(count: int, grid_size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """(count, h, w) bool, True where hidden: MASKED of the blocks of MASK_BLOCK x MASK_BLOCK patches each."""
    rows, columns = (-(-side // MASK_BLOCK) for side in grid_size)
    hidden = round(MASKED * rows * columns)
    order = torch.rand(count, rows * columns, generator=generator).argsort(1)
    blocks = (order.argsort(1) < hidden).view(count, rows, columns)
    mask = blocks.repeat_interleave(MASK_BLOCK, 1).repeat_interleave(MASK_BLOCK, 2)
    return mask[:, : grid_size[0], : grid_size[1]]


def encoded(encoder: Any, images: Tensor, blocks: range | None = None) -> list[Tensor]:
    """The tokens (B, h, w, D) after `blocks`, of the last one unless given."""
    depth = len(encoder.blocks)
    maps = encoder.forward_intermediates(images, tuple(blocks or (depth - 1,)))
    return [tokens.permute(0, 2, 3, 1) for tokens in maps]


def normed(tokens: Tensor) -> Tensor:
    """Layer normalisation over the last axis, without scale and shift."""
    return F.layer_norm(tokens, tokens.shape[-1:])
