"""A style without weights: the mean colour and the covariance of the bands, changed by one affine map.

Shapes: B images, H/W pixels, P = H·W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rsmodels.style.base import check_embedding, check_images

# Where the numbers of an embedding after the means stand in the symmetric matrix.
ROWS, COLUMNS = (0, 1, 2, 0, 0, 1), (0, 1, 2, 1, 2, 2)
NOISE = 1 / 255  # one grey level of 8 bits


class ColorStyle:
    """Mean and covariance of an image's three bands as its style (S = 9).

    The embedding is, in this order: the means of bands 1, 2, 3; then, of the symmetric square root of their
    covariance (divided by the number of pixels), the entries 11, 22, 33, 12, 13, 23. Its square is the
    covariance. It is the root that is embedded, because the square of any symmetric matrix is a covariance:
    what is sampled from a normal distribution, or mixed of two images, always belongs to some image.

    Transfer whitens and colours: with roots A of the image's covariance, T of the wanted one (its negative
    eigenvalues, which only a sample can have, set to 0) and s = `noise`, pixels go from mean m to t by
        x ↦ t + (T·A + s²) (A² + s²)⁻¹ (x - m).
    Where an image varies by more than s this is T·A⁻¹; directions in which it does not vary, as all of a flat
    image's and two of a grey one's, are amplified by T/2s at most, so that noise stays noise.
    An image's own embedding gives the image back. Results are clamped to [0, 1].
    """

    name = "color"
    size = 9

    def __init__(self, *, noise: float = NOISE) -> None:
        if not noise > 0:
            raise ValueError(f"noise={noise}: expected a standard deviation above 0, such as 1/255")
        self.noise = noise

    def fingerprint(self) -> None:
        """No weights make these embeddings."""

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) float in [0, 1] → (B, 9) float32, in the order above."""
        images = check_images(images, "ColorStyle")
        with torch.autocast(images.device.type, enabled=False):
            mean_b31, root_b33 = _moments(images)
            return torch.cat([mean_b31.flatten(1), root_b33[:, ROWS, COLUMNS]], dim=1)

    @torch.no_grad()
    def transfer(self, images: Tensor, embedding: Tensor) -> Tensor:
        """images (B, 3, H, W) in [0, 1], with the means and covariances that embedding (B, 9) says."""
        images = check_images(images, "ColorStyle")
        embedding = check_embedding(embedding, images, self.size, "ColorStyle")
        with torch.autocast(images.device.type, enabled=False):
            mean_b31, root_b33 = _moments(images)
            entries = embedding[:, 3:]
            wanted_b33 = entries.new_zeros(len(images), 3, 3)
            wanted_b33[:, ROWS, COLUMNS] = entries
            wanted_b33[:, COLUMNS, ROWS] = entries
            values, vectors = torch.linalg.eigh(_finite(wanted_b33))
            wanted_b33 = _compose(values.clamp(min=0), vectors)
            slack = self.noise**2 * torch.eye(3, device=images.device)
            # G·(A² + s²) = T·A + s², solved for G; A² is symmetric.
            map_b33 = torch.linalg.solve(root_b33 @ root_b33 + slack, root_b33 @ wanted_b33 + slack).mT
            shift_b31 = embedding[:, :3, None] - map_b33 @ mean_b31
            pixels_b3p = torch.baddbmm(shift_b31, map_b33, images.flatten(2))
            return pixels_b3p.clamp_(0, 1).view_as(images)


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Means (B, 3, 1) and roots of the covariances (B, 3, 3)."""
    pixels_b3p = images.flatten(2)
    mean_b31 = pixels_b3p.mean(2, keepdim=True)
    # Two passes: the mean of squares less the square of the mean loses the colours of a pale image. Image by
    # image: fresh memory for a copy of a whole batch takes longer than the arithmetic.
    covariance_b33 = torch.stack([_outer(one - mean) for one, mean in zip(pixels_b3p, mean_b31, strict=True)])
    values, vectors = torch.linalg.eigh(_finite(covariance_b33))
    return mean_b31, _compose(values.clamp(min=0).sqrt(), vectors)


def _outer(centred_3p: Tensor) -> Tensor:
    return centred_3p @ centred_3p.mT / centred_3p.shape[1]


def _compose(values: Tensor, vectors: Tensor) -> Tensor:
    return (vectors * values[:, None, :]) @ vectors.mT


def _finite(matrices: Tensor) -> Tensor:
    """Eigenvalues of NaN are an error that names no image; so NaN travels on with the pixels instead."""
    return matrices.nan_to_num()
