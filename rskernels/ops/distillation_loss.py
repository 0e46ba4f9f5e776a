"""distillation_loss: Kullback-Leibler divergence and mean squared error of a student's and a teacher's maps
(KTDA, arXiv 2412.13823 eq. (2); the authors' public code computes another divergence, see below).

Shapes: B batch, C channels, h/w map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rskernels.dispatch import choose

AXES = ("channel", "width")
DIRECTIONS = ("student||teacher", "teacher||student")
REDUCTIONS = ("mean", "batchmean")


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    axis: str = "channel",
    direction: str = "student||teacher",
    temperature: float = 1.0,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """(kl, mse) of two maps. The defaults are the paper's loss; the authors' code is axis="width",
    direction="teacher||student", reduction="batchmean", temperature=1.

    With P = softmax(student / T) and Q = softmax(teacher / T) along `axis`:
    kl = T² · sum P (log P − log Q) / count for "student||teacher", Q (log Q − log P) for "teacher||student".
    mse = mean over all elements of (student − teacher)², at no temperature.

    Args:
        student, teacher: (B, C, h, w). The teacher gets no gradient.
        axis: "channel" (one distribution per pixel) or "width" (one per batch, channel and image row).
        temperature: T > 0.
        reduction: count is the number of distributions (B·h·w, or B·C·h along the width) for "mean",
            B for "batchmean".
    Returns:
        Two scalars. Computed in float32 (float64 if an argument is), whatever autocast says.
    Raises:
        ValueError: shapes that differ, an unknown option, temperature <= 0. TypeError: not floating point.
    """
    _check(student, teacher, axis, direction, temperature, reduction)
    choose("distillation_loss", student, teacher)
    return distillation_loss_reference(student, teacher, axis, direction, temperature, reduction)


def distillation_loss_reference(
    student: Tensor, teacher: Tensor, axis: str, direction: str, temperature: float, reduction: str
) -> tuple[Tensor, Tensor]:
    """What defines the operator."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    student, teacher = student.to(dtype), teacher.detach().to(dtype)
    dim = 1 if axis == "channel" else 3
    log_p = F.log_softmax(student / temperature, dim)
    log_q = F.log_softmax(teacher / temperature, dim)
    if direction == "teacher||student":
        log_p, log_q = log_q, log_p
    count = student.shape[0] if reduction == "batchmean" else student.numel() // student.shape[dim]
    kl = (log_p.exp() * (log_p - log_q)).sum() * (temperature**2 / count)
    return kl, F.mse_loss(student, teacher)


def _check(
    student: Tensor, teacher: Tensor, axis: str, direction: str, temperature: float, reduction: str
) -> None:
    for name, tensor in (("student", student), ("teacher", teacher)):
        if tensor.dim() != 4 or tensor.numel() == 0:
            raise ValueError(
                f"distillation_loss: {name} has shape {tuple(tensor.shape)}; expected (B, C, h, w), not empty"
            )
        if not tensor.is_floating_point():
            raise TypeError(f"distillation_loss: {name} is {tensor.dtype}; expected a floating-point tensor")
    if student.shape != teacher.shape:
        raise ValueError(
            f"distillation_loss: student has shape {tuple(student.shape)}, teacher {tuple(teacher.shape)}; "
            "expected the same, resize one of them"
        )
    if student.device != teacher.device:
        raise ValueError(f"distillation_loss: student is on {student.device}, teacher on {teacher.device}")
    for name, value, allowed in (
        ("axis", axis, AXES),
        ("direction", direction, DIRECTIONS),
        ("reduction", reduction, REDUCTIONS),
    ):
        if value not in allowed:
            raise ValueError(f"distillation_loss: {name} is {value!r}; expected one of {allowed}")
    if not temperature > 0:
        raise ValueError(f"distillation_loss: temperature is {temperature}; expected > 0")
