"""Self-attention and feed-forward layer of a plain vision transformer, through rskernels."""

from torch import Tensor, nn

import rskernels
from rsmodels.layers.linear import Linear


class SelfAttention(nn.Module):
    """Multi-head self-attention: (B, N, D) → (B, N, D)."""

    def __init__(self, dim: int, *, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unsqueeze(1)  # a grid of one row
        out = rskernels.rel_pos_attention(qkv, None, None, num_heads=self.num_heads)
        return self.proj(out.squeeze(1))


class FeedForward(nn.Module):
    """fc2(gelu(fc1(x))), `ratio` times as wide inside."""

    def __init__(self, dim: int, *, ratio: float = 4.0) -> None:
        super().__init__()
        self.fc1 = Linear(dim, int(ratio * dim), activation="gelu")
        self.fc2 = Linear(int(ratio * dim), dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))
