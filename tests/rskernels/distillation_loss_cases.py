"""Calls of distillation_loss, and the C++ kernel compared with the reference in float64."""

from dataclasses import dataclass

import pytest
import torch
from accuracy import allowed_error

import rskernels
from rskernels import dispatch

needs_cpp = pytest.mark.skipif(
    "cpp" in dispatch.UNAVAILABLE, reason=f"no C++ backend: {dispatch.UNAVAILABLE.get('cpp')}"
)
NAMES = ("kl", "mse", "student")
# Loss and gradient of nearly equal maps are small differences of large terms. Where they are smaller than
# these shares of the terms (see terms()) the shares measure the error: 2e-7 in a distribution's divergence.
KL_CANCELLED, GRADIENT_CANCELLED = 0.1, 0.5
LAYOUTS = ("contiguous", "channels_last", "tokens", "transposed", "channels", "crop")


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int] = (2, 40, 5, 7)
    layouts: tuple[str, str] = ("contiguous", "contiguous")
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32)
    axis: str = "channel"
    direction: str = "student||teacher"
    temperature: float = 1.0
    reduction: str = "mean"
    magnitude: float = 1.0
    offset: float = 0.0  # of the teacher
    distance: float = 1.0  # of the teacher from the student, beside its own values when 1
    seed: int = 0

    def options(self):
        return {name: getattr(self, name) for name in ("axis", "direction", "temperature", "reduction")}

    def maps(self):
        rng = torch.Generator().manual_seed(self.seed)
        student = torch.randn(self.shape, generator=rng) * self.magnitude
        teacher = torch.randn(self.shape, generator=rng) * self.magnitude * self.distance + self.offset
        if self.distance < 1:
            teacher = teacher + student
        pairs = zip((student, teacher), self.dtypes, self.layouts, strict=True)
        return [laid_out(values.to(dtype), layout) for values, dtype, layout in pairs]


def laid_out(values, layout):
    """The same values in another memory layout; what lies between them is NaN, to be left alone."""
    b, c, h, w = values.shape
    if layout == "channels_last":
        return values.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    if layout == "tokens":  # after a class token
        tokens = values.new_full((b, 1 + h * w, c), torch.nan)
        tokens[:, 1:] = values.flatten(2).transpose(1, 2)
        return tokens[:, 1:].unflatten(1, (h, w)).permute(0, 3, 1, 2)
    if layout == "transposed":
        return values.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "channels":
        more = values.new_full((b, c + 2, h, w), torch.nan)
        more[:, 1:-1] = values
        return more[:, 1:-1]
    if layout == "crop":
        larger = values.new_full((b, c, h + 1, w + 3), torch.nan)
        larger[..., 1:, 2:-1] = values
        return larger[..., 1:, 2:-1]
    return values.contiguous()


def losses_and_gradient(case, student, teacher, backend):
    student = student.detach().requires_grad_()
    with rskernels.backend(backend):
        kl, mse = rskernels.distillation_loss(student, teacher, **case.options())
    weights = [torch.tensor(value, dtype=kl.dtype) for value in (0.7, 1.3)]
    (gradient,) = torch.autograd.grad((kl, mse), student, weights)
    return kl.detach(), mse.detach(), gradient


def terms(case, student, teacher):
    """What each result is compared with at least: a share of the sum of all probabilities, which weigh the
    logarithms' rounding, and of the gradient's terms before they are subtracted from each other."""
    s, t = student.detach().double(), teacher.double()
    dim = 1 if case.axis == "channel" else 3
    log_p, log_q = ((x / case.temperature).log_softmax(dim) for x in (s, t))
    p = log_p.exp()
    count = case.shape[0] if case.reduction == "batchmean" else s.numel() // s.shape[dim]
    scale = case.temperature**2 / count
    # The paper's gradient is P (d - mean of d), the other one P - Q.
    gradient = p if case.direction == "teacher||student" else p * (log_p - log_q).abs()
    gradient_size = 0.7 * scale / case.temperature * gradient.norm().item()
    return KL_CANCELLED * scale * p.sum().item(), 0.0, GRADIENT_CANCELLED * gradient_size


def relative_error(value, truth, floor):
    return ((value.double() - truth).norm() / truth.norm().clamp_min(max(floor, 1e-30))).item()


def eager_errors(case, student, teacher, truths, floors):
    """What eager of the same dtype reaches. Where terms cancel, one scalar's rounding is luck: the worst of
    some orders of the values, which change nothing else."""
    dim = 1 if case.axis == "channel" else 3
    generator = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(8 if case.distance < 1 else 1):
        order = torch.randperm(student.shape[dim], generator=generator)
        kl, mse, gradient = losses_and_gradient(
            case, student.index_select(dim, order), teacher.index_select(dim, order), "reference"
        )
        values = (kl, mse, gradient.index_select(dim, order.argsort()))
        errors.append([relative_error(*one) for one in zip(values, truths, floors, strict=True)])
    return [max(column) for column in zip(*errors, strict=True)]


def compare(case):
    student, teacher = case.maps()
    truths = losses_and_gradient(case, student.double(), teacher.double(), "reference")
    floors = terms(case, student, teacher)
    eagers = eager_errors(case, student, teacher, truths, floors)
    values = losses_and_gradient(case, student, teacher, "cpp")
    assert values[2].dtype == student.dtype
    assert values[2].stride() == torch.empty_like(student).stride()
    for name, value, eager, truth, floor in zip(NAMES, values, eagers, truths, floors, strict=True):
        bound = max(allowed_error(value), 2 * eager)
        assert relative_error(value, truth, floor) < bound, (name, case)


BOTH = (torch.float32, torch.bfloat16)
CASES = [
    Case(shape=(2, 64, 16, 16)),
    Case(shape=(4, 24, 48, 48)),  # many pixels: wide tiles
    Case(shape=(2, 48, 14, 14), layouts=("contiguous", "channels")),
    Case(shape=(2, 96, 8, 8), layouts=("channels_last", "tokens")),
    Case(shape=(1, 131, 5, 5), layouts=("channels_last", "channels_last")),
    Case(shape=(2, 70, 9, 9), layouts=("contiguous", "channels_last")),
    Case(shape=(2, 70, 9, 9), layouts=("tokens", "contiguous"), temperature=3.0),
    Case(shape=(2, 20, 6, 6), layouts=("transposed", "crop"), reduction="batchmean"),
    Case(shape=(2, 9, 5, 32), axis="width"),
    Case(shape=(2, 9, 5, 14), axis="width"),
    Case(shape=(1, 3, 4, 130), axis="width", layouts=("crop", "channels")),
    Case(shape=(2, 40, 5, 17), axis="width", layouts=("channels_last", "channels_last")),
    Case(shape=(2, 20, 3, 17), axis="width", layouts=("contiguous", "tokens"), temperature=0.5),
    Case(shape=(3, 1, 4, 5)),
    Case(
        shape=(2, 1, 3, 5), axis="width", layouts=("contiguous", "crop")
    ),  # images further apart than rows tell
    Case(shape=(3, 5, 4, 1), axis="width"),
    Case(shape=(2, 60, 1, 1), layouts=("contiguous", "channels_last")),
    Case(shape=(1, 3, 5, 1), layouts=("channels_last", "transposed")),
]
