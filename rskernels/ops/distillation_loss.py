"""distillation_loss: Kullback-Leibler divergence and mean squared error of a student's and a teacher's maps
(KTDA, arXiv 2412.13823 eq. (2); the authors' public code computes another divergence, see below).

Shapes: B batch, C channels, h/w map, M distributions (B·h·w, or B·C·h along the width).

docs/kernels/distillation_loss.md explains the kernels (csrc/cpu, rskernels/triton) and has figures.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rskernels.dispatch import choose
from rskernels.library import check_finite, check_tensors, define, differentiate, once_differentiable

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
        student, teacher: (B, C, h, w), any strides; contiguous, channels-last and sliced maps are read in
            place, each in its own layout. The teacher gets no gradient.
        axis: "channel" (one distribution per pixel) or "width" (one per batch, channel and image row).
        temperature: T > 0. In float32 the rounding error of kl grows with T², as its parts cancel: some
            1e-4 of it at T = 100, 1e-2 at 1000, all of it at 1e4. Its gradient stays within 1e-2.
        reduction: count is the number of distributions (B·h·w, or B·C·h along the width) for "mean",
            B for "batchmean".
    Returns:
        Two scalars. Computed in float32 (float64 if an argument is), whatever autocast says. The gradient
        has the student's dtype and layout.
    Dtypes: float32 and bfloat16, also one of each, are accelerated on the CPU; by Triton on CUDA, when asked
        for by name, these and float16 for both. The reference serves all else.
    Raises:
        ValueError: shapes that differ, an unknown option, temperature <= 0. TypeError: not a
            floating-point tensor; temperature not a number.
    """
    _check(student, teacher, axis, direction, temperature, reduction)
    # The kernels take either dtype beside the other.
    free = teacher.dtype in (torch.float32, torch.bfloat16)
    if choose("distillation_loss", student, None if free else teacher) == "reference":
        return distillation_loss_reference(student, teacher, axis, direction, temperature, reduction)
    kl, mse, _ = _loss_forward(student, teacher.detach(), axis, direction, float(temperature), reduction)
    return kl, mse


def distillation_loss_reference(
    student: Tensor, teacher: Tensor, axis: str, direction: str, temperature: float, reduction: str
) -> tuple[Tensor, Tensor]:
    """What defines the operator."""
    dtype, dim = _compute_dtype(student, teacher), _dim(axis)
    student, teacher = student.to(dtype), teacher.detach().to(dtype)
    log_p = F.log_softmax(student / temperature, dim)
    log_q = F.log_softmax(teacher / temperature, dim)
    if direction == "teacher||student":
        log_p, log_q = log_q, log_p
    kl = (log_p.exp() * (log_p - log_q)).sum() * (temperature**2 / _count(student, dim, reduction))
    return kl, F.mse_loss(student, teacher)


def _compute_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)


def _dim(axis: str) -> int:
    return 1 if axis == "channel" else 3


def _count(student: Tensor, dim: int, reduction: str) -> int:
    return student.shape[0] if reduction == "batchmean" else student.numel() // student.shape[dim]


def _check(
    student: Tensor, teacher: Tensor, axis: str, direction: str, temperature: float, reduction: str
) -> None:
    check_tensors("distillation_loss", {"student": student, "teacher": teacher})
    for name, tensor in (("student", student), ("teacher", teacher)):
        if tensor.dim() != 4 or tensor.numel() == 0:
            raise ValueError(
                f"distillation_loss: {name} has shape {tuple(tensor.shape)}; expected (B, C, h, w), not empty"
            )
    if student.shape != teacher.shape:
        raise ValueError(
            f"distillation_loss: student has shape {tuple(student.shape)}, teacher {tuple(teacher.shape)}; "
            "expected the same, resize one of them"
        )
    for name, value, allowed in (
        ("axis", axis, AXES),
        ("direction", direction, DIRECTIONS),
        ("reduction", reduction, REDUCTIONS),
    ):
        if value not in allowed:
            raise ValueError(f"distillation_loss: {name} is {value!r}; expected one of {allowed}")
    check_finite("distillation_loss", "temperature", temperature, "a finite number > 0")
    if temperature <= 0:
        raise ValueError(f"distillation_loss: temperature is {temperature}; expected a finite number > 0")


# ---------------------------------------------------------------- registration


def _forward_composite(
    student: Tensor, teacher: Tensor, axis: str, direction: str, temperature: float, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    kl, mse = distillation_loss_reference(student, teacher, axis, direction, temperature, reduction)
    dtype, dim = _compute_dtype(student, teacher), _dim(axis)
    student, teacher = student.to(dtype), teacher.to(dtype)

    def reference_and_inverse(values: Tensor) -> tuple[Tensor, Tensor]:
        largest = values.amax(dim, keepdim=True)
        return largest, 1 / ((values - largest) / temperature).exp().sum(dim, keepdim=True)

    rows = [*reference_and_inverse(student)]
    if direction == "student||teacher":
        p = (student / temperature).softmax(dim)
        rows.append((p * (student - teacher)).sum(dim, keepdim=True))
    else:
        rows += reference_and_inverse(teacher)
    return kl, mse, torch.stack([row.flatten() for row in rows])


def _backward_composite(
    grad_kl: Tensor | None,
    grad_mse: Tensor | None,
    student: Tensor,
    teacher: Tensor,
    stats: Tensor,
    axis: str,
    direction: str,
    temperature: float,
    reduction: str,
) -> Tensor:
    dtype, dim = _compute_dtype(student, teacher), _dim(axis)
    s, t = student.to(dtype), teacher.to(dtype)
    gradient = torch.zeros_like(s)
    if grad_kl is not None:
        p = (s / temperature).softmax(dim)
        if direction == "student||teacher":
            difference = s - t
            kl_gradient = p * (difference - (p * difference).sum(dim, keepdim=True))
        else:
            kl_gradient = temperature * (p - (t / temperature).softmax(dim))
        gradient = gradient + kl_gradient * (grad_kl / _count(student, dim, reduction))
    if grad_mse is not None:
        gradient = gradient + (s - t) * (grad_mse * 2 / s.numel())
    return torch.empty_like(student).copy_(gradient)


def _forward_fake(
    student: Tensor, teacher: Tensor, axis: str, direction: str, temperature: float, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    scalar = student.new_empty((), dtype=_compute_dtype(student, teacher))
    rows = 3 if direction == "student||teacher" else 4
    stats = scalar.new_empty(rows, _count(student, _dim(axis), "mean"))
    return scalar, torch.empty_like(scalar), stats


def _backward_fake(
    grad_kl: Tensor | None,
    grad_mse: Tensor | None,
    student: Tensor,
    teacher: Tensor,
    stats: Tensor,
    axis: str,
    direction: str,
    temperature: float,
    reduction: str,
) -> Tensor:
    return torch.empty_like(student)


_OPTIONS = "str axis, str direction, float temperature, str reduction"

# Both losses, and per distribution what backward rebuilds the probabilities from: (3, M) the student's
# reference (its exponentials are exp((s - reference) / T)), the inverse of their sum, the mean of s - t (the
# Triton kernel's: less a constant that it takes out first) under the student's probabilities; or, for
# "teacher||student", (4, M) reference and inverse of either map.
_loss_forward = define(
    f"distillation_loss_forward(Tensor student, Tensor teacher, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    reference=_forward_composite,
    fake=_forward_fake,
    triton="distillation_loss.forward",
)
_loss_backward = define(
    "distillation_loss_backward(Tensor? grad_kl, Tensor? grad_mse, Tensor student, Tensor teacher, "
    f"Tensor stats, {_OPTIONS}) -> Tensor",
    reference=_backward_composite,
    fake=_backward_fake,
    triton="distillation_loss.backward",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(student, teacher, output[2])


def _backward(
    ctx: Any, grad_kl: Tensor | None, grad_mse: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if (grad_kl is None and grad_mse is None) or not ctx.needs_input_grad[0]:
        return (None,) * 6
    return _loss_backward(grad_kl, grad_mse, *ctx.saved_tensors, *ctx.options), *((None,) * 5)


differentiate("distillation_loss_forward", _backward, _setup_context)
once_differentiable("distillation_loss_backward")
