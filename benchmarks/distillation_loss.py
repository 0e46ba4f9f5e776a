"""KL and MSE of a student's and a teacher's maps against eager PyTorch, torch.compile of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import rskernels
from benchmarks.measure import PASSES, Call, Case, batches, call_of, device, dtypes, on_gpu

# (B, C, h, w): ViT-B's and ViT-L's maps of 512 and 1024 pixels.
SHAPES = [(4, 768, 32, 32)]
# (layouts, axis, direction): the paper's loss on three kinds of maps, then the authors' code.
FORMS = [
    ("contiguous", "channel", "student||teacher"),
    ("channels-last", "channel", "student||teacher"),
    ("contiguous student, channels-last teacher", "channel", "student||teacher"),
    ("contiguous", "width", "teacher||student"),
]


def _eager(student: Tensor, teacher: Tensor, *, axis: str, direction: str) -> tuple[Tensor, Tensor]:
    """As the public code of such methods has it, in fp32."""
    dim = 1 if axis == "channel" else 3
    student, teacher = student.float(), teacher.float()
    log_p, log_q = F.log_softmax(student, dim), F.log_softmax(teacher, dim)
    if direction == "student||teacher":
        log_p, log_q = log_q, log_p
    count = student.numel() // student.shape[dim]
    kl = F.kl_div(log_p, log_q, reduction="sum", log_target=True) / count
    return kl, F.mse_loss(student, teacher)


def _through_liger(student: Tensor, teacher: Tensor, *, axis: str, direction: str) -> tuple[Tensor, Tensor]:
    """Liger's KL kernel takes rows of log-probabilities: the softmaxes and the MSE are PyTorch's."""
    from liger_kernel.transformers import LigerKLDIVLoss

    dim = 1 if axis == "channel" else 3
    student, teacher = student.float(), teacher.float()
    rows = [F.log_softmax(x, dim).movedim(dim, -1).flatten(0, -2) for x in (student, teacher)]
    log_p, log_q = rows if direction == "teacher||student" else rows[::-1]
    kl = LigerKLDIVLoss(reduction="batchmean", log_target=True)(log_p, log_q)
    return kl, F.mse_loss(student, teacher)


def _build(
    shape: tuple[int, int, int, int], layout: str, axis: str, direction: str, dtype: torch.dtype, which: str
) -> dict[str, Call]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(shape, generator=generator).to(device(), dtype) for _ in range(2))
    if layout == "channels-last":
        student = student.to(memory_format=torch.channels_last)
    if "channels-last" in layout:
        teacher = teacher.to(memory_format=torch.channels_last)
    student.requires_grad_()
    grads = (torch.tensor(0.5, device=device()), torch.tensor(0.5, device=device()))
    options = {"axis": axis, "direction": direction}
    forms: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
        "rskernels": partial(rskernels.distillation_loss, **options),
        "eager": partial(_eager, **options),
        "compiled": torch.compile(partial(_eager, **options)),
    }
    if on_gpu():
        forms["Liger's KL"] = partial(_through_liger, **options)
    return {name: call_of(which, form, (student, teacher), grads) for name, form in forms.items()}


def cases() -> list[Case]:
    shapes = [(batches() * batch, *sizes) for batch, *sizes in SHAPES]
    return [
        Case(
            name=f"{which}, {'x'.join(map(str, shape))}, {layout}, {axis}, {str(dtype)[6:]}",
            build=partial(_build, shape, layout, axis, direction, dtype, which),
            dtype=dtype,
            # Two reads forward; two reads and a write backward.
            bytes=math.prod(shape) * dtype.itemsize * {"forward": 2, "backward": 3, "both": 5}[which],
        )
        for shape in shapes
        for layout, axis, direction in FORMS
        for dtype in dtypes()
        for which in PASSES
    ]
