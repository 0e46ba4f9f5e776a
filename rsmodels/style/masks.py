"""The random masks of CrossEarth's eqs. (3) and (4): one draw per patch, stretched to the image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MODES = ("eq4", "ratio")


def draw_mask(
    batch: int,
    size: tuple[int, int],
    patch: int,
    ratio: float,
    mode: str = "eq4",
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Masks (batch, 1, H, W) float32 of ones and zeros, one random number u in [0, 1) per patch.

    Args:
        size: H and W in pixels, any. The ceil(H/B) x ceil(W/B) draws are stretched to it (nearest), so that
            patches are a little smaller than B where B does not divide the size.
        patch: B, in pixels.
        ratio: τ, in [0, 1].
        mode: "eq4": 1 where u > τ, so that a share of 1 - τ is 1; "ratio": 1 where u < τ, a share of τ.
        generator: of the CPU; PyTorch's global one without it. It is drawn on the CPU: one seed, the same
            masks on every device.
        device: where the masks are to be.
    """
    check_mask(patch, ratio, mode)
    height, width = size
    grid = -(-height // patch), -(-width // patch)
    draws = torch.rand(batch, 1, *grid, generator=generator, device="cpu")
    mask = draws > ratio if mode == "eq4" else draws < ratio
    return F.interpolate(mask.float().to(device), size=(height, width), mode="nearest")


def check_mask(patch: int, ratio: float, mode: str) -> None:
    """ValueError where these describe no mask."""
    if isinstance(patch, bool) or not isinstance(patch, int) or patch < 1:
        raise ValueError(f"patch={patch!r}: expected the side of the mask's patches in pixels, 1 or more")
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio={ratio}: expected the mask's threshold, between 0 and 1")
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
