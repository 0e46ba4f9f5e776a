"""UPerNet (Xiao et al. 2018, https://arxiv.org/abs/1807.10221): pyramid pooling on the coarsest map, a
feature pyramid on top of it.

Parameter for parameter mmsegmentation's UPerHead, so that decoders trained with it load.
Shapes: B batch, C_i channels of level i, D width, K classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rsmodels.layers import ConvNormAct, conv_of_resized, resize

POOL_SIZES = (1, 2, 3, 6)


class UPerNetHead(nn.Module):
    """Maps (B, C_i, ·, ·), finest first → logits (B, K, ·, ·) at the size of the finest.

    Args:
        in_dims: C_i.
        num_classes: K.
        dim: D.
        dropout: share of channels dropped before the classifier.
    """

    def __init__(
        self, in_dims: Sequence[int], num_classes: int, *, dim: int = 512, dropout: float = 0.1
    ) -> None:
        super().__init__()
        *finer, coarsest = in_dims
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), ConvNormAct(coarsest, dim, 1)) for size in POOL_SIZES
        )
        self.bottleneck = ConvNormAct(coarsest + len(POOL_SIZES) * dim, dim, 3)
        self.lateral_convs = nn.ModuleList(ConvNormAct(in_dim, dim, 1) for in_dim in finer)
        self.fpn_convs = nn.ModuleList(ConvNormAct(dim, dim, 3) for _ in finer)
        self.fpn_bottleneck = ConvNormAct(len(in_dims) * dim, dim, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(dim, num_classes, kernel_size=1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        *finer, coarsest = features
        x = self._pool(coarsest)
        levels = [x]
        for lateral, fpn, feature in reversed(
            list(zip(self.lateral_convs, self.fpn_convs, finer, strict=True))
        ):
            x = lateral(feature) + resize(x, feature.shape[-2:])
            levels.append(fpn(x))
        return self.conv_seg(self.dropout(self._fuse(levels[::-1])))

    def _fuse(self, levels: Sequence[Tensor]) -> Tensor:
        """fpn_bottleneck of all levels at the finest one's size, side by side. Its convolution is the sum of
        one per level, which needs no level at a size other than its own."""
        size = levels[0].shape[-2:]
        weights = self.fpn_bottleneck.conv.weight.split([level.shape[1] for level in levels], dim=1)
        parts = [conv_of_resized(level, size, w) for level, w in zip(levels, weights, strict=True)]
        return self.fpn_bottleneck.bn(sum(parts[1:], parts[0])).relu()

    def _pool(self, x: Tensor) -> Tensor:
        pooled = [resize(psp(x), x.shape[-2:]) for psp in self.psp_modules]
        return self.bottleneck(torch.cat([x, *pooled], dim=1))
