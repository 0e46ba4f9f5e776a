"""distillation_loss: the paper's loss and the authors' code, each against an independent float64 formula."""

import itertools
import math

import pytest
import torch

import rskernels
from rskernels.ops.distillation_loss import AXES, DIRECTIONS, REDUCTIONS


def softmax(values):
    top = max(values)
    powers = [math.exp(v - top) for v in values]
    return [p / sum(powers) for p in powers]


def formula(student, teacher, *, axis, direction, temperature, reduction):
    """Plain Python over lists."""
    batch, channels, height, width = student.shape
    if axis == "channel":
        rows = [(b, slice(None), i, j) for b in range(batch) for i in range(height) for j in range(width)]
    else:
        rows = [(b, c, i, slice(None)) for b in range(batch) for c in range(channels) for i in range(height)]
    kl = 0.0
    for index in rows:
        p = softmax([v / temperature for v in student[index].tolist()])
        q = softmax([v / temperature for v in teacher[index].tolist()])
        if direction == "teacher||student":
            p, q = q, p
        kl += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
    kl *= temperature**2 / (len(rows) if reduction == "mean" else batch)
    pairs = zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)
    return kl, sum((a - b) ** 2 for a, b in pairs) / student.numel()


def maps(dtype=torch.float64, shape=(2, 5, 3, 4)):
    return torch.randn(*shape, dtype=dtype, requires_grad=True), torch.randn(*shape, dtype=dtype)


@pytest.mark.parametrize(
    ("axis", "direction", "reduction", "temperature"),
    list(itertools.product(AXES, DIRECTIONS, REDUCTIONS, (1.0, 2.5))),
)
def test_matches_formula_and_gradcheck(axis, direction, reduction, temperature):
    options = {"axis": axis, "direction": direction, "reduction": reduction, "temperature": temperature}
    student, teacher = maps()
    kl, mse = rskernels.distillation_loss(student, teacher, **options)
    expected = formula(student.detach(), teacher, **options)
    assert (kl.item(), mse.item()) == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda s: rskernels.distillation_loss(s, teacher, **options), student)


def test_equal_maps_cost_nothing():
    student, _ = maps()
    kl, mse = rskernels.distillation_loss(student, student.detach().clone())
    assert abs(kl.item()) < 1e-15 and mse.item() == 0


def test_teacher_gets_no_gradient():
    student, teacher = maps()
    teacher.requires_grad_()
    sum(rskernels.distillation_loss(student, teacher)).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


@pytest.mark.parametrize("dtypes", list(itertools.product((torch.float32, torch.bfloat16), repeat=2)))
def test_low_precision_inputs_are_computed_in_float32(dtypes):
    student, teacher = (t.detach().to(d) for t, d in zip(maps(), dtypes, strict=True))
    expected = rskernels.distillation_loss(student.double(), teacher.double())
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = rskernels.distillation_loss(student, teacher)
        for loss, value in zip(losses, expected, strict=True):
            assert loss.dtype == torch.float32
            assert loss.item() == pytest.approx(value.item(), rel=2e-6)


def test_huge_logits_stay_finite():
    student, teacher = (1e4 * t.detach().float() for t in maps())
    assert all(torch.isfinite(loss) for loss in rskernels.distillation_loss(student, teacher))


def test_compiles_as_one_graph():
    student, teacher = maps(torch.float32)
    compiled = torch.compile(rskernels.distillation_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(student, teacher), rskernels.distillation_loss(student, teacher))


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (ValueError, "axis is 'height'", {"axis": "height"}),
        (ValueError, "direction is 'both'", {"direction": "both"}),
        (ValueError, "reduction is 'sum'", {"reduction": "sum"}),
        (ValueError, "temperature is 0; expected a finite number > 0", {"temperature": 0}),
        (ValueError, "temperature is nan", {"temperature": float("nan")}),
        (ValueError, r"teacher has shape \(5, 3\)", {"teacher": torch.zeros(5, 3)}),
        (ValueError, r"teacher \(2, 5, 3, 3\); expected the same", {"teacher": torch.zeros(2, 5, 3, 3)}),
        (TypeError, "teacher is torch.uint8", {"teacher": torch.zeros(2, 5, 3, 4, dtype=torch.uint8)}),
    ],
)
def test_bad_arguments(error, match, options):
    student, teacher = maps()
    with pytest.raises(error, match=match):
        rskernels.distillation_loss(student, **({"teacher": teacher} | options))
