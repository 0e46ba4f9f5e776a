"""FCN head (Long et al. 2015, https://arxiv.org/abs/1411.4038): one convolution and a classifier on one map.

Parameter for parameter mmsegmentation's FCNHead with `num_convs=1, concat_input=False`, its usual auxiliary
head. Shapes: B batch, C channels, D width, K classes.
"""

from torch import Tensor, nn

from rsmodels.layers import ConvNormAct


class FCNHead(nn.Module):
    """(B, C, h, w) → logits (B, K, h, w).

    Args:
        in_dim: C.
        num_classes: K.
        dim: D.
        dropout: share of channels dropped before the classifier.
    """

    def __init__(self, in_dim: int, num_classes: int, *, dim: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        self.convs = nn.Sequential(ConvNormAct(in_dim, dim, 3))
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(dim, num_classes, kernel_size=1)

    def forward(self, feature: Tensor) -> Tensor:
        return self.conv_seg(self.dropout(self.convs(feature)))
