"""RS-SAM's multi-scale neck (eq. 1): a pyramid from a plain ViT, as in ViTDet.

Shapes: B batch, D encoder embedding, h/w tokens at 1/16 of the image.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from rsmodels.layers import LayerNorm2d, make_neck


class MultiScaleNeck(nn.Module):
    """Four (B, D, h, w) maps → (B, dim, ·, ·) at 1/4, 1/8, 1/16 and 1/32 of the image, in that order.

    RS-SAM gives the last block's map four times; Table 6's variant gives four blocks' maps. Each scale ends
    in SAM's neck; `neck_16` is the one that SAM's own weights fit. The widths of the upsampling, D/2 and
    D/4, are not in the paper; they put the parameter counts where the paper prints them.
    """

    def __init__(self, embed_dim: int, dim: int) -> None:
        super().__init__()
        self.up_4 = nn.Sequential(
            nn.ConvTranspose2d(embed_dim, embed_dim // 2, kernel_size=2, stride=2),
            LayerNorm2d(embed_dim // 2),
            nn.GELU(),
            nn.ConvTranspose2d(embed_dim // 2, embed_dim // 4, kernel_size=2, stride=2),
        )
        self.up_8 = nn.ConvTranspose2d(embed_dim, embed_dim // 2, kernel_size=2, stride=2)
        self.down_32 = nn.MaxPool2d(kernel_size=2)
        self.neck_4 = make_neck(embed_dim // 4, dim)
        self.neck_8 = make_neck(embed_dim // 2, dim)
        self.neck_16 = make_neck(embed_dim, dim)
        self.neck_32 = make_neck(embed_dim, dim)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        x_4, x_8, x_16, x_32 = features
        return [
            self.neck_4(self.up_4(x_4)),
            self.neck_8(self.up_8(x_8)),
            self.neck_16(x_16),
            self.neck_32(self.down_32(x_32)),
        ]
