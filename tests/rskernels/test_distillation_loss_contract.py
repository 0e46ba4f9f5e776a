"""distillation_loss as an operator: wanted gradients, compilation, export, dtypes."""

import pytest
import torch
from distillation_loss_cases import BOTH, Case, losses_and_gradient, needs_cpp, relative_error

import rskernels
from rskernels.ops.distillation_loss import AXES, DIRECTIONS


@needs_cpp
@pytest.mark.parametrize("weights", [(1.0, None), (None, 2.0), (0.0, 1.0)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradient_of_one_loss_alone(direction, weights):
    case = Case(direction=direction)
    gradients = []
    for backend, dtype in (("cpp", torch.float32), ("reference", torch.float64)):
        student, teacher = (x.to(dtype) for x in case.maps())
        student.requires_grad_()
        with rskernels.backend(backend):
            losses = rskernels.distillation_loss(student, teacher, **case.options())
        sum(w * loss for w, loss in zip(weights, losses, strict=True) if w is not None).backward()
        gradients.append(student.grad)
    assert relative_error(*gradients, 0) < 2e-6


@needs_cpp
def test_teacher_gets_no_gradient_and_a_frozen_student_costs_none():
    student, teacher = (x.requires_grad_() for x in Case().maps())
    with rskernels.backend("cpp"):
        sum(rskernels.distillation_loss(student, teacher)).backward()
        assert not rskernels.distillation_loss(student.detach(), teacher)[0].requires_grad
    assert teacher.grad is None and student.grad.any()


@needs_cpp
def test_second_derivative_is_an_error_not_a_wrong_answer():
    student, teacher = Case().maps()
    student.requires_grad_()
    kl, _ = rskernels.distillation_loss(student, teacher)
    (gradient,) = torch.autograd.grad(kl, student, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.sum().backward()


@needs_cpp
@pytest.mark.parametrize("layouts", [("contiguous",) * 2, ("channels_last", "contiguous")])
def test_opcheck(layouts):
    for axis, direction in zip(AXES, DIRECTIONS, strict=True):
        student, teacher = Case(layouts=layouts, dtypes=BOTH).maps()
        tail = (axis, direction, 2.0, "mean")
        forward = torch.ops.rskernels.distillation_loss_forward.default
        torch.library.opcheck(forward, (student.clone().requires_grad_(), teacher, *tail))
        kl, mse, stats = forward(student, teacher, *tail)
        backward = torch.ops.rskernels.distillation_loss_backward.default
        torch.library.opcheck(backward, (kl, mse, student, teacher, stats, *tail))
        torch.library.opcheck(backward, (None, mse, student, teacher, stats, *tail))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_composite_operators_match_the_reference(axis, direction):
    """What serves the registered operators where no extension is built; their statistics are the kernel's."""
    case = Case(axis=axis, direction=direction, temperature=2.0)
    student, teacher = case.maps()
    expected = losses_and_gradient(case, student.double(), teacher.double(), "reference")
    operators, tail = torch.ops.rskernels, tuple(case.options().values())
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    maps = (student.double(), teacher.double())
    kl, mse, stats = operators.distillation_loss_forward.default.redispatch(keys, *maps, *tail)
    weights = [torch.tensor(value, dtype=torch.float64) for value in (0.7, 1.3)]
    gradient = operators.distillation_loss_backward.default.redispatch(keys, *weights, *maps, stats, *tail)
    for value, truth in zip((kl, mse, gradient), expected, strict=True):
        torch.testing.assert_close(value, truth)
    assert stats.shape == operators.distillation_loss_forward(student, teacher, *tail)[2].shape


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole_with_gradients(dynamic):
    def loss(x, teacher):
        kl, mse = rskernels.distillation_loss(2 * x, teacher, direction="teacher||student")
        return kl + 0.5 * mse

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in [(2, 20, 4, 6), (3, 24, 5, 7)]:
        x, teacher = (t.detach() for t in Case(shape=shape).maps())
        x.requires_grad_()
        expected, out = loss(x, teacher), compiled(x, teacher)
        torch.testing.assert_close(out, expected)
        (value,), (truth,) = torch.autograd.grad(out, x), torch.autograd.grad(expected, x)
        torch.testing.assert_close(value, truth)
    torch.compiler.reset()


def test_exports():
    class Loss(torch.nn.Module):
        def forward(self, student, teacher):
            return rskernels.distillation_loss(student, teacher)

    maps = Case().maps()
    batch = torch.export.Dim("batch")
    program = torch.export.export(Loss(), tuple(maps), dynamic_shapes=[{0: batch}, {0: batch}])
    more = Case(shape=(5, 40, 5, 7)).maps()
    torch.testing.assert_close(program.module()(*more), Loss()(*more))


@needs_cpp
def test_other_dtypes_go_to_the_reference():
    student, teacher = Case().maps()
    for dtypes in ((torch.float16, torch.float16), (torch.float32, torch.float64), (torch.float64,) * 2):
        s, t = student.to(dtypes[0]), teacher.to(dtypes[1])
        assert rskernels.distillation_loss(s, t)[0].dtype == torch.promote_types(dtypes[1], torch.float32)
        with rskernels.backend("cpp"), pytest.raises(ValueError, match="cannot serve distillation_loss"):
            rskernels.distillation_loss(s, t)
