"""SAM's neck: from the encoder's width to the decoder's."""

from torch import nn

from rsmodels.layers.norm import LayerNorm2d


def make_neck(in_dim: int, out_dim: int) -> nn.Sequential:
    """SAM's neck: (B, in_dim, h, w) → (B, out_dim, h, w)."""
    return nn.Sequential(
        nn.Conv2d(in_dim, out_dim, kernel_size=1, bias=False),
        LayerNorm2d(out_dim),
        nn.Conv2d(out_dim, out_dim, kernel_size=3, padding=1, bias=False),
        LayerNorm2d(out_dim),
    )
