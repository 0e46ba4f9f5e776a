"""Backend "sdpa": attention by PyTorch's own kernels, on the CPU and on CUDA, where it is asked for by name.

`rel_pos_attention` and `cross_attention` compose their operator from it; autograd differentiates the
composition. PyTorch chooses the kernel (torch.nn.attention.sdpa_kernel restricts it), and with it accuracy
and determinism.
"""

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """softmax(scale·q kᵀ + bias) v, per head.

    Args:
        q: (B, h, Q, d). k, v: (B or 1, h, M, d).
        bias: (B, h or 1, Q, M): in the dtype of q, or bool with True = attend; every row attends somewhere.
    Returns:
        (B, h, Q, d), of any strides.
    """
    k, v = (t.expand(len(q), -1, -1, -1) for t in (k, v))  # the fused kernels know no broadcasting
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
