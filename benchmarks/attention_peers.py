"""Who computes attention on a GPU besides us: SDPA's backends, each by name, FlexAttention, xformers.

All take q (B, heads, N, d), k and v (B, heads, M, d) as F.scaled_dot_product_attention does. One that cannot
serve a call, or is not installed, raises at its first: the report names it with the reason.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[..., Tensor]  # (q, k, v, attn_mask=None, scale=None)

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def _sdpa(
    backend: SDPBackend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=scale)


def sdpa(*, biased: bool) -> dict[str, Attention]:
    """SDPA by backend; flash takes no mask and no bias."""
    names = [name for name in _BACKENDS if not (biased and name == "flash")]
    return {f"sdpa, {name}": partial(_sdpa, _BACKENDS[name]) for name in names}


def xformers(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    from xformers.ops import memory_efficient_attention

    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -torch.inf)
        attn_mask = attn_mask.expand(q.shape[0], q.shape[1], -1, -1)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return memory_efficient_attention(q, k, v, attn_bias=attn_mask, scale=scale).transpose(1, 2)


@functools.cache
def flex_masked() -> Attention:
    """FlexAttention, compiled; the mask (B, 1, N, M), True to attend, as a score_mod that reads it."""
    from torch.nn.attention.flex_attention import flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        def masked(score: Tensor, b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return torch.where(mask[b, 0, query, key], score, -torch.inf)

        out = flex_attention(q, k, v, score_mod=None if mask is None else masked, scale=scale)
        assert isinstance(out, Tensor)
        return out

    compiled: Callable[..., Tensor] = torch.compile(attend, dynamic=False)

    def call(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        return compiled(q.contiguous(), k.contiguous(), v.contiguous(), attn_mask, scale)

    return call
