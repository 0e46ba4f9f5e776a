"""Convolution, batch norm and ReLU in one module, with the parameter names of the field's checkpoints."""

from torch import Tensor, nn


class ConvNormAct(nn.Module):
    """relu(norm(conv(x))), the size kept: (B, in_dim, h, w) → (B, out_dim, h, w)."""

    def __init__(self, in_dim: int, out_dim: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, out_dim, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()
