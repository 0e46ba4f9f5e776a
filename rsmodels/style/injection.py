"""Earth-style injection: images X in the styles of a field archive, X_S (CrossEarth, §3.2, eqs. 1–5).

Shapes: B images, H/W pixels, S numbers in an embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rsmodels.style.base import StyleModel, check_images
from rsmodels.style.masks import check_mask, draw_mask
from rsmodels.style.statistics import COVARIANCES, StyleStatistics, sample_embeddings


class EarthStyle(nn.Module):
    """X → X_S = p_t(ε', X)·M + X·(1 - M), where ε' mixes a style sampled from the field with X's own.

    Everything random comes from PyTorch's global generator of the CPU, in every call anew. Nothing learns.
    The statistics are buffers, so that a model that owns this module keeps them in its state.

    Args:
        style: the style model, p_s and p_t.
        statistics: of the field archive's embeddings under that style; those of another style, or of other
            weights, are a ValueError. None leaves NaN in the buffers, for a state dict to fill.
        mix: share of the sampled embedding in what is injected; the rest is the image's own (ε of eq. 1).
        ratio, patch, mode: τ, B and the reading of the masks of X_S, see draw_mask. "eq4" styles a share of
            1 - τ of the image, as eqs. (4) and (5) are written; "ratio" styles τ of it, as Appendix A argues.
        covariance: "full", or "diagonal" as eq. (2) is written, see sample_embeddings.
    """

    mean: Tensor
    covariance: Tensor

    def __init__(
        self,
        style: StyleModel,
        statistics: StyleStatistics | None = None,
        *,
        mix: float = 0.5,
        ratio: float,
        patch: int,
        mode: str = "eq4",
        covariance: str = "full",
    ) -> None:
        super().__init__()
        if not 0 <= mix <= 1:
            raise ValueError(f"mix={mix}: expected the sampled style's share, between 0 and 1")
        if covariance not in COVARIANCES:
            raise ValueError(f"covariance={covariance!r}: expected one of {', '.join(COVARIANCES)}")
        check_mask(patch, ratio, mode)
        self.style = style
        self.mix, self.ratio, self.patch, self.mode, self.sampling = mix, ratio, patch, mode, covariance
        if statistics is None:
            mean = torch.full((style.size,), torch.nan)
            matrix = torch.full((style.size, style.size), torch.nan)
        else:
            statistics.check(style)
            mean, matrix = statistics.mean.float(), statistics.covariance.float()
        self.register_buffer("mean", mean)
        self.register_buffer("covariance", matrix)

    def embeddings(self, images: Tensor) -> Tensor:
        """What is injected into images (B, 3, H, W) in [0, 1]: (B, S), each image's drawn anew."""
        sampled = sample_embeddings(self.mean, self.covariance, len(images), covariance=self.sampling)
        if self.mix == 1:
            return sampled
        return self.mix * sampled + (1 - self.mix) * self.style.embed(images)

    def masks(
        self, images: Tensor, *, ratio: float | None = None, patch: int | None = None, mode: str | None = None
    ) -> Tensor:
        """Masks (B, 1, H, W) for images (B, ·, H, W), drawn anew: X_S's, or with another τ, B and reading.

        X_M has its own τ and B, and knows one reading: ratio=…, patch=…, mode="eq4".
        """
        return draw_mask(
            len(images),
            (images.shape[-2], images.shape[-1]),
            self.patch if patch is None else patch,
            self.ratio if ratio is None else ratio,
            self.mode if mode is None else mode,
            device=images.device,
        )

    @torch.no_grad()
    def styled(self, images: Tensor) -> Tensor:
        """X (B, 3, H, W) float in [0, 1] → X_S (B, 3, H, W) float32; where M is 0, X to the last bit."""
        images = check_images(images, "EarthStyle")
        with torch.autocast(images.device.type, enabled=False):
            injected = self.style.transfer(images, self.embeddings(images))
            return torch.where(self.masks(images) > 0, injected, images)

    def extra_repr(self) -> str:
        return (
            f"style={self.style.name!r}, mix={self.mix}, ratio={self.ratio}, patch={self.patch}, "
            f"mode={self.mode!r}, covariance={self.sampling!r}"
        )
