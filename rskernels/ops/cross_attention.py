"""cross_attention: queries of one set attend to keys of another (SAM's decoder, Mask2Former, Rein, injector).

Shapes: B batch, h heads, Q queries, M keys, d head dim.
"""

import torch
from torch import Tensor

from rskernels.dispatch import choose
from rskernels.library import cast_to_compute_dtype


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    drop_first_key_value: bool = False,
) -> Tensor:
    """softmax(scale·q kᵀ + log mask) v, per head.

    Args:
        q: (B, h, Q, d).
        k, v: (B, h, M, d), or (1, h, M, d) shared by the whole batch.
        mask: (B, Q, M) bool, shared by the heads, True = attend (as SDPA). A row that attends nowhere
            attends everywhere (Mask2Former's rule; it keeps the softmax finite).
        scale: factor of the logits, 1/sqrt(d) by default.
        drop_first_key_value: the first key counts in the softmax and contributes nothing to the output
            (Rein's "nothing" token): the other weights are not renormalised.
    Returns:
        (B, h, Q, d) in the dtype of q; under autocast in autocast's dtype (float64 stays).
    Raises:
        ValueError: shapes that do not fit, no keys. TypeError: mask not bool, q, k or v not floating point.
    """
    _check(q, k, v, mask)
    q, k, v = cast_to_compute_dtype(q, q, k, v)
    choose("cross_attention", q, k, v)
    return cross_attention_reference(q, k, v, mask, scale, drop_first_key_value)


def cross_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, drop_first_key_value: bool
) -> Tensor:
    """What defines the operator; q, k, v in one dtype."""
    # Not F.scaled_dot_product_attention: on the CPU it returns zeros for a query that holds NaN. The logits
    # are float32 at least, as they are inside a fused kernel.
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        logits = (q.to(dtype) * scale) @ k.to(dtype).transpose(-2, -1)
        if mask is not None:
            logits = logits.masked_fill((~mask & mask.any(-1, keepdim=True))[:, None], -torch.inf)
        weights = logits.softmax(-1)
        if drop_first_key_value:
            weights, v = weights[..., 1:], v[:, :, 1:]
        return (weights @ v.to(dtype)).to(q.dtype)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(
                f"cross_attention: {name} has shape {tuple(tensor.shape)}; expected 4 dimensions"
            )
        if not tensor.is_floating_point():
            raise TypeError(f"cross_attention: {name} is {tensor.dtype}; expected a floating-point tensor")
        if tensor.device != q.device:
            raise ValueError(f"cross_attention: {name} is on {tensor.device}, q on {q.device}")
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    if keys == 0:
        raise ValueError(f"cross_attention: k has shape {tuple(k.shape)}; expected at least one key")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape[0] not in (1, batch) or tuple(tensor.shape[1:]) != (heads, keys, dim):
            raise ValueError(
                f"cross_attention: {name} has shape {tuple(tensor.shape)}; "
                f"expected ({batch} or 1, {heads}, {keys}, {dim}) for q {tuple(q.shape)}"
            )
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"cross_attention: mask is {mask.dtype}; expected torch.bool, True = attend")
    if tuple(mask.shape) != (batch, queries, keys):
        raise ValueError(
            f"cross_attention: mask has shape {tuple(mask.shape)}; expected ({batch}, {queries}, {keys})"
        )
    if mask.device != q.device:
        raise ValueError(f"cross_attention: mask is on {mask.device}, q on {q.device}")
