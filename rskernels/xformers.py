"""Backend "xformers": attention by xFormers' kernels on CUDA, where it is asked for by name.

As rskernels.sdpa, through xformers.ops.memory_efficient_attention (https://github.com/facebookresearch/xformers),
which wants its tensors as (B, tokens, h, d), rows that start at multiples of 16 bytes, and an additive bias.
"""

import functools
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from rskernels.dispatch import UNAVAILABLE, wanted

ALIGNMENT = 16  # bytes


def ruled_out(q: Tensor, head_dim: int) -> dict[str, str] | None:
    """What keeps xFormers from heads of `head_dim` channels in the dtype of q, for dispatch.choose; looked at
    only where xFormers was asked for."""
    if wanted() != "xformers" or "xformers" in UNAVAILABLE:
        return None
    multiple = ALIGNMENT // q.element_size()
    if head_dim % multiple:
        return {"xformers": f"the head dim is {head_dim}; it takes multiples of {multiple} in this dtype"}
    return {"xformers": _problem()} if _problem() else None


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """softmax(scale·q kᵀ + bias) v, per head; arguments and result as those of rskernels.sdpa.attention."""
    B, h, Q, _ = q.shape
    tokens = [_aligned(t.expand(B, -1, -1, -1)).transpose(1, 2) for t in (q, k, v)]
    if bias is not None:
        bias = _padded_rows(bias, q).expand(B, h, Q, -1)
    return _load()(*tokens, attn_bias=bias, scale=scale).transpose(1, 2)


@functools.cache
def _load() -> Callable[..., Tensor]:
    """xFormers' attention. Importing it takes seconds: not before it is asked for."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention


@functools.cache
def _problem() -> str:
    """'' where xFormers loads, else why it does not, as when it was built for another torch."""
    try:
        _load()
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"it does not load ({(str(error) or type(error).__name__).splitlines()[0]})"
    return ""


def _aligned(x_bhnd: Tensor) -> Tensor:
    """x, copied where its channels are no neighbours or its rows do not start at multiples of ALIGNMENT."""
    multiple = ALIGNMENT // x_bhnd.element_size()
    *outer, inner = x_bhnd.stride()
    if inner == 1 and not any(place % multiple for place in (*outer, x_bhnd.storage_offset())):
        return x_bhnd
    return x_bhnd.transpose(1, 2).contiguous().transpose(1, 2)


def _padded_rows(bias: Tensor, q: Tensor) -> Tensor:
    """An additive bias in the dtype of q, rows at multiples of ALIGNMENT: the view of a padded one."""
    if not bias.is_floating_point():
        bias = bias.new_zeros(bias.shape, dtype=q.dtype).masked_fill(~bias, float("-inf"))
    keys = bias.shape[-1]
    missing = -keys % (ALIGNMENT // q.element_size())
    return F.pad(bias, (0, missing))[..., :keys] if missing else bias
