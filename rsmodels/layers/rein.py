"""Rein (Wei et al. 2024, https://arxiv.org/abs/2312.04265): learned tokens that refine a frozen transformer.

Shapes: B batch, N tokens of the image, D embedding, T learned tokens, r rank, L layers, E query width.
"""

import torch
from torch import Tensor, nn

import rskernels
from rsmodels.layers.linear import Linear


class Rein(nn.Module):
    """What is added to the patch tokens f after each of L blocks, and the queries linked to it.

        S = softmax(f·Tᵀ / √D),   f + scale · MLP_f(S'·MLP_t(T)' + f)

    where ' leaves the first token out: it takes its part of the softmax and gives nothing ("nothing to add"),
    and the rest is not normalised again. T = A·B is of low rank, per layer; MLP_t and MLP_f are one linear
    layer each, shared by all layers, as is the scale.

    Args:
        depth: L.
        dim: D.
        tokens: T, which is also the number of queries.
        rank: r.
        query_dim: E.
        scale: its first value.
    """

    def __init__(
        self,
        depth: int,
        dim: int,
        *,
        tokens: int = 100,
        rank: int = 16,
        query_dim: int = 256,
        scale: float = 1e-3,
    ) -> None:
        super().__init__()
        if tokens < 2 or rank < 1:
            raise ValueError(
                f"Rein with tokens={tokens}, rank={rank}: expected at least 2 tokens, as the first one "
                "stands for nothing, and a rank of at least 1"
            )
        self.token_a = nn.Parameter(torch.empty(depth, tokens, rank))
        self.token_b = nn.Parameter(torch.empty(depth, rank, dim))
        # The published code's at a width of 1024 and a rank of 16; elsewhere tokens of the same norm. By its
        # formula they shrink with the width, and the queries made of them start as good as equal.
        bound = (6 / 896 * (1024 * 16 / (dim * rank)) ** 0.5) ** 0.5
        nn.init.uniform_(self.token_a, -bound, bound)
        nn.init.uniform_(self.token_b, -bound, bound)
        self.mlp_token = Linear(dim, dim)
        self.mlp_delta = Linear(dim, dim)
        self.scale = nn.Parameter(torch.full((1,), scale))  # FSDP2 shards no tensor without dimensions
        self.to_query = Linear(dim, query_dim)
        self.merge = Linear(3 * query_dim, query_dim)
        self.to_feature = Linear(query_dim, query_dim)

    def forward(self, x: Tensor, index: int, prefix_tokens: int) -> Tensor:
        """(B, prefix + N, D) after block `index` → the same, refined; class token and registers are left."""
        prefix, f_bnd = x[:, :prefix_tokens], x[:, prefix_tokens:]
        tokens_td = self.token_a[index] @ self.token_b[index]
        added = rskernels.cross_attention(  # one head of width D: its scale is 1/√D
            f_bnd.unsqueeze(1),
            tokens_td[None, None],
            self.mlp_token(tokens_td)[None, None],
            drop_first_key_value=True,
        )
        delta = self.mlp_delta(added.squeeze(1) + f_bnd)
        return torch.cat([prefix, f_bnd + self.scale * delta], dim=1)

    def queries(self) -> tuple[Tensor, Tensor]:
        """The decoder's queries, made of the tokens of all layers: position and feature, each (T, E)."""
        per_layer = self.to_query(self.token_a @ self.token_b)  # (L, T, E)
        pooled = [per_layer.amax(dim=0), per_layer.mean(dim=0), per_layer[-1]]
        # The three stand side by side for every channel, as the published weights have them.
        position = self.merge(torch.stack(pooled, dim=-1).flatten(1))
        return position, self.to_feature(position)
