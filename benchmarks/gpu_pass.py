"""Every operator once through its public function, small, sizes that divide no tile: what compute-sanitizer
watches, and what shows that the kernels serve."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import rskernels
from benchmarks import measure
from benchmarks.gpu_processes import answers, tell, told
from benchmarks.report import in_one_line

Outputs = Tensor | tuple[Tensor, ...]


def some(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*size).to(measure.device(), dtype).requires_grad_()


def global_attention(dtype: torch.dtype) -> Outputs:
    qkv, rel_pos_h, rel_pos_w = (some(*size, dtype=dtype) for size in ((1, 9, 7, 192), (17, 32), (13, 32)))
    return rskernels.rel_pos_attention(qkv, rel_pos_h, rel_pos_w, num_heads=2)


def windowed_attention(dtype: torch.dtype) -> Outputs:
    qkv, rel_pos_h, rel_pos_w = (some(*size, dtype=dtype) for size in ((1, 9, 7, 192), (7, 32), (7, 32)))
    pad = some(192, dtype=dtype)
    return rskernels.rel_pos_attention(qkv, rel_pos_h, rel_pos_w, num_heads=2, window_size=4, pad_qkv=pad)


def plain_attention(dtype: torch.dtype) -> Outputs:
    return rskernels.rel_pos_attention(some(2, 37, 1, 192, dtype=dtype), None, None, num_heads=2)


def masked_attention(dtype: torch.dtype) -> Outputs:
    q, k, v = (some(2, 2, tokens, 32, dtype=dtype) for tokens in (5, 67, 67))
    mask = torch.rand(2, 5, 67, device=measure.device()) > 0.5
    return rskernels.cross_attention(q, k, v, mask=mask)


def cross_attention(dtype: torch.dtype) -> Outputs:
    q, k, v = (some(2, 2, tokens, 16, dtype=dtype) for tokens in (67, 7, 7))
    return rskernels.cross_attention(q, k, v)


def lora_qkv(dtype: torch.dtype) -> Outputs:
    x, weight, bias = some(2, 9, 48, dtype=dtype), some(144, 48, dtype=dtype), some(144, dtype=dtype)
    a_q, b_q, a_v, b_v = (some(*size, dtype=dtype) for size in ((4, 48), (48, 4), (4, 48), (48, 4)))
    return rskernels.lora_qkv(x, weight.detach(), bias.detach(), a_q, b_q, a_v, b_v, scale=0.5)


def lora_linear(dtype: torch.dtype) -> Outputs:
    x, weight, bias = some(2, 9, 48, dtype=dtype), some(48, 48, dtype=dtype), some(48, dtype=dtype)
    a, b = some(4, 48, dtype=dtype), some(48, 4, dtype=dtype)
    return rskernels.lora_linear(x, weight.detach(), bias.detach(), a, b, scale=0.5)


def distillation_loss(dtype: torch.dtype) -> Outputs:
    student, teacher = some(2, 33, 5, 7, dtype=dtype), some(2, 33, 5, 7, dtype=dtype)
    return rskernels.distillation_loss(student, teacher.detach())


def distillation_loss_kl_alone(dtype: torch.dtype) -> Outputs:
    """Backward gets no gradient of the other loss."""
    return distillation_loss(dtype)[0]


def distillation_loss_mse_alone(dtype: torch.dtype) -> Outputs:
    return distillation_loss(dtype)[1]


def dilated_aspp(dtype: torch.dtype) -> Outputs:
    weights = [some(24, 20, 3, 3, dtype=dtype) for _ in range(4)]
    biases = [some(24, dtype=dtype) for _ in range(4)]
    return rskernels.dilated_aspp(some(1, 20, 13, 11, dtype=dtype), weights, biases, activation="relu")


def deformable_attention(dtype: torch.dtype) -> Outputs:
    locations = some(2, 11, 2, 2, 4, 2, dtype=torch.float32)
    weights = some(2, 11, 2, 2, 4, dtype=torch.float32)
    return rskernels.deformable_attention(
        some(2, 44, 2, 16, dtype=dtype), ((5, 7), (3, 3)), locations, weights
    )


def linear(dtype: torch.dtype) -> Outputs:
    x, weight, bias = some(2, 9, 48, dtype=dtype), some(24, 48, dtype=dtype), some(24, dtype=dtype)
    return rskernels.linear(x, weight, bias, activation="gelu")


def layer_norm(dtype: torch.dtype) -> Outputs:
    return rskernels.layer_norm(some(9, 48, dtype=dtype), some(48, dtype=dtype), some(48, dtype=dtype))


CALLS: tuple[Callable[[torch.dtype], Outputs], ...] = (
    global_attention,
    windowed_attention,
    plain_attention,
    masked_attention,
    cross_attention,
    lora_qkv,
    lora_linear,
    distillation_loss,
    distillation_loss_kl_alone,
    distillation_loss_mse_alone,
    dilated_aspp,
    deformable_attention,
    linear,
    layer_norm,
)


def run(file: Path | None) -> bool:
    """Every call, forward and backward, in float32 and bfloat16; what `file` has a begin of is left out.
    False where the device answers no more: its process is of no use then."""
    before = {line.get("begun") for line in told(file)}
    for dtype in (torch.float32, torch.bfloat16):
        for call in CALLS:
            name = f"{call.__name__}, {str(dtype)[6:]}"
            if name in before:
                continue
            print(f"{name} ...", flush=True)
            tell(file, begun=name)
            problem = _problem(call, dtype)
            print(f"{name}: {problem or 'done'}", flush=True)
            tell(file, ended=name, problem=problem)
            if problem and not answers():
                return False
    return True


def _problem(call: Callable[[torch.dtype], Outputs], dtype: torch.dtype) -> str:
    """What a call raises, the device's faults included; "" where nothing."""
    try:
        outputs = call(dtype)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.stack([output.float().sum() for output in outputs]).sum().backward()
        if measure.on_gpu():
            torch.cuda.synchronize()
    except Exception as error:  # one operator's: the others are asked too
        return in_one_line(error)
    finally:
        gc.collect()
    return ""
