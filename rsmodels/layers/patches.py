"""Images cut into patches."""

from torch import Tensor, nn

import rskernels


class PatchEmbed(nn.Module):
    """Non-overlapping patches, embedded: (B, C, H, W) → (B, h, w, D)."""

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        # As one product over the patches: a convolution would leave the channels in front, and every norm
        # and residual addition behind it would pay for strided memory.
        side = self.proj.kernel_size[0]
        patches_bhwcyx = images.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 1, 3, 5)
        return rskernels.linear(patches_bhwcyx.flatten(3), self.proj.weight.flatten(1), self.proj.bias)
