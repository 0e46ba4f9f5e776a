"""What a style model is, and which values it works on: three bands in [0, 1], 1 = white.

Shapes: B images, H/W pixels, S numbers in a style embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

VALUE_RANGE = 255.0  # the raw value that is white, of 8-bit images


class StyleModel(Protocol):
    """Takes the style off an image as an embedding, and puts any embedding's style onto one.

    name: recorded with the statistics of its embeddings. size: S, the numbers in an embedding.
    """

    name: str
    size: int

    def embed(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) float in [0, 1] → embeddings (B, S) float32, without gradient."""

    def transfer(self, images: Tensor, embedding: Tensor) -> Tensor:
        """images (B, 3, H, W) in [0, 1] in the style of embedding (B, S): float32, in [0, 1], no gradient."""

    def fingerprint(self) -> str | None:
        """A hash of the weights that make the embeddings; None where there are none."""


def check_images(images: Tensor, what: str) -> Tensor:
    """`images` in float32 if a style model can take them, or a one-line error that begins with `what`."""
    if not images.is_floating_point():
        raise TypeError(
            f"{what}: images are {images.dtype}; give floating-point values in [0, 1], see to_unit"
        )
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"{what}: images of shape {tuple(images.shape)}; a style is of three bands, (B, 3, H, W): "
            "choose three"
        )
    return images.float()


def check_embedding(embedding: Tensor, images: Tensor, size: int, what: str) -> Tensor:
    """`embedding` in float32 if it is one row of `size` numbers per image, or a one-line error."""
    if embedding.shape != (len(images), size):
        raise ValueError(
            f"{what}: embeddings of shape {tuple(embedding.shape)} for {len(images)} images; expected "
            f"({len(images)}, {size}), what this style's embed gives"
        )
    return embedding.float()


def to_unit(
    images: Tensor, mean: Sequence[float], std: Sequence[float], value_range: float = VALUE_RANGE
) -> Tensor:
    """Normalised images (B, C, H, W) → raw values over `value_range`: [0, 1] for the values of a sensor.

    Args:
        mean, std: of the model's Preprocessing, one per band, in raw units.
        value_range: the raw value that is white, 255 for 8 bits; 10000 for most reflectances in 16 bits.
    """
    mean_c, std_c = _constants(images, mean, std, value_range)
    return (images * std_c + mean_c) / value_range


def from_unit(
    images: Tensor, mean: Sequence[float], std: Sequence[float], value_range: float = VALUE_RANGE
) -> Tensor:
    """The inverse of to_unit: [0, 1] → normalised."""
    mean_c, std_c = _constants(images, mean, std, value_range)
    return (images * value_range - mean_c) / std_c


def _constants(
    images: Tensor, mean: Sequence[float], std: Sequence[float], value_range: float
) -> tuple[Tensor, Tensor]:
    if not value_range > 0:
        raise ValueError(
            f"value_range={value_range}: expected the raw value that is white, above 0 (8 bits: 255)"
        )
    if not len(mean) == len(std) == images.shape[1]:
        raise ValueError(
            f"images have {images.shape[1]} bands, mean and std {len(mean)} and {len(std)} values; give "
            "one per band"
        )
    mean_c, std_c = (torch.tensor(tuple(v), dtype=images.dtype).view(-1, 1, 1) for v in (mean, std))
    return mean_c.to(images.device), std_c.to(images.device)
