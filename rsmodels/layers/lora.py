"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) on the q and v parts of a fused qkv projection."""

from typing import Any

import torch
from torch import Tensor, nn

import rskernels
from rsmodels.layers.linear import Linear


class LoRAQKV(Linear):
    """A frozen qkv projection (..., D) → (..., 3·D) with trainable rank-r updates of its q and v parts.

    The frozen weight and bias keep nn.Linear's names, so that a plain qkv's state dict loads. `lora_a_*` are
    Kaiming uniform and `lora_b_*` zero: a new layer computes what the plain projection does, to the last bit.

    Args:
        dim: D.
        rank: r.
        alpha: the update is scaled by alpha / rank; alpha = rank unless given.
    """

    merged_weight: Tensor | None

    def __init__(self, dim: int, *, rank: int, alpha: float | None = None) -> None:
        super().__init__(dim, 3 * dim)
        self.scale = (rank if alpha is None else alpha) / rank
        self.lora_a_q = nn.Parameter(torch.empty(rank, dim))
        self.lora_b_q = nn.Parameter(torch.empty(dim, rank))
        self.lora_a_v = nn.Parameter(torch.empty(rank, dim))
        self.lora_b_v = nn.Parameter(torch.empty(dim, rank))
        # W stays as it is while merged: unmerging is exact, and a state dict never holds the update twice.
        self.register_buffer("merged_weight", None, persistent=False)
        self.weight.requires_grad_(False)
        self.bias.requires_grad_(False)
        self.reset_lora()

    def reset_lora(self) -> None:
        """Draw A anew and set B to zero."""
        for a in (self.lora_a_q, self.lora_a_v):
            nn.init.kaiming_uniform_(a, a=5**0.5)
        for b in (self.lora_b_q, self.lora_b_v):
            nn.init.zeros_(b)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged_weight is not None:
            return rskernels.linear(x, self.merged_weight, self.bias)
        return rskernels.lora_qkv(
            x,
            self.weight,
            self.bias,
            self.lora_a_q,
            self.lora_b_q,
            self.lora_a_v,
            self.lora_b_v,
            scale=self.scale,
        )

    @torch.no_grad()
    def merge_lora(self) -> None:
        """Compute with W + scale·BA from now on: one plain product, for inference. `train()` unmerges."""
        merged = self.weight.detach().clone()
        query, _, value = merged.chunk(3)
        query.add_(self.lora_b_q @ self.lora_a_q, alpha=self.scale)
        value.add_(self.lora_b_v @ self.lora_a_v, alpha=self.scale)
        self.merged_weight = merged

    def unmerge_lora(self) -> None:
        """Compute with W and the low-rank update again, exactly as before merge_lora()."""
        self.merged_weight = None

    def train(self, mode: bool = True) -> "LoRAQKV":
        if mode:
            self.unmerge_lora()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unmerge_lora()  # what was merged came from the previous weights
        super()._load_from_state_dict(*args, **kwargs)
