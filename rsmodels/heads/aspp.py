"""CrossEarth's decoders of the masked-image flow (arXiv 2410.22629, eqs. 8 and 9; Table 9).

Shapes: B batch, h/w the encoder's grid, p pixels per token, H/W = h·p/w·p pixels, D embedding.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rskernels
from rsmodels.layers import Linear

DILATIONS = (1, 6, 12, 18)
STAGES = len(DILATIONS)


class ASPPDecoder(nn.Module):
    """Four stages (B, D, h, w) → images (B, 3, H, W): a 3x3 convolution per stage, dilated by 1, 6, 12, 18,
    the results side by side, one linear layer to the p² pixels of a token. No activation, as in eqs. 8 and 9.

    Args:
        dim: D.
        patch_size: p.
        width: channels of each convolution.
    """

    def __init__(self, dim: int, *, patch_size: int = 16, width: int = 256) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"ASPP decoder of width {width}: expected at least 1")
        self.patch_size = patch_size
        # The dilation is stated for whoever reads or converts the module; dilated_aspp runs all four at once.
        self.convs = nn.ModuleList(nn.Conv2d(dim, width, 3, padding=d, dilation=d) for d in DILATIONS)
        self.to_pixels = Linear(STAGES * width, 3 * patch_size**2)

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        convs: Any = self.convs
        pixels = rskernels.dilated_aspp(
            list(stages),
            [conv.weight for conv in convs],
            [conv.bias for conv in convs],
            dilations=DILATIONS,
            projection=(self.to_pixels.weight, self.to_pixels.bias),
        )
        return F.pixel_shuffle(pixels, self.patch_size)


class LinearDecoder(nn.Module):
    """Table 9's other row: four stages (B, D, h, w), side by side, through one linear layer to the p² pixels
    of a token: images (B, 3, H, W).

    Args:
        dim: D.
        patch_size: p.
    """

    def __init__(self, dim: int, *, patch_size: int = 16) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.to_pixels = Linear(STAGES * dim, 3 * patch_size**2)

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        tokens = torch.cat([stage.permute(0, 2, 3, 1) for stage in stages], dim=-1)
        return F.pixel_shuffle(self.to_pixels(tokens).permute(0, 3, 1, 2), self.patch_size)
