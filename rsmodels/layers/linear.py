"""Projections through rskernels.linear, and the two-layer perceptron of SAM's transformers."""

from torch import Tensor, nn

import rskernels


class Linear(nn.Linear):
    """nn.Linear, parameter for parameter, with an optional activation: (..., D_in) → (..., D_out)."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, activation: str | None = None
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return rskernels.linear(x, self.weight, self.bias, activation=self.activation)


class MLP(nn.Module):
    """lin2(activation(lin1(x))), with SAM's parameter names."""

    def __init__(self, dim: int, hidden_dim: int, out_dim: int | None = None, *, activation: str) -> None:
        super().__init__()
        self.lin1 = Linear(dim, hidden_dim, activation=activation)
        self.lin2 = Linear(hidden_dim, out_dim or dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(self.lin1(x))
