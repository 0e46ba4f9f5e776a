"""distillation_loss: the C++ kernel against the reference in float64, losses and gradient."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from accuracy import allowed_error
from hypothesis import given, settings
from hypothesis import strategies as st

import rskernels
from rskernels import dispatch
from rskernels.ops.distillation_loss import AXES, DIRECTIONS, REDUCTIONS

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


@needs_cpp
@pytest.mark.parametrize("dtypes", list(itertools.product(BOTH, repeat=2)), ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_float64_reference(case, dtypes):
    for direction in DIRECTIONS:
        compare(replace(case, dtypes=dtypes, direction=direction))


@needs_cpp
@settings(max_examples=60, deadline=None, print_blob=True)
@given(
    case=st.builds(
        Case,
        shape=st.tuples(st.integers(1, 3), st.integers(1, 150), st.integers(1, 12), st.integers(1, 40)),
        layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
        dtypes=st.tuples(st.sampled_from(BOTH), st.sampled_from(BOTH)),
        axis=st.sampled_from(AXES),
        direction=st.sampled_from(DIRECTIONS),
        temperature=st.sampled_from([0.5, 1.0, 4.0]),
        reduction=st.sampled_from(REDUCTIONS),
        magnitude=st.sampled_from([0.1, 1.0, 5.0]),
        offset=st.sampled_from([0.0, 3.0]),
        distance=st.sampled_from([0.01, 0.1, 1.0]),
        seed=st.integers(0, 2**16),
    )
)
def test_matches_the_float64_reference_on_any_map(case):
    compare(case)


@needs_cpp
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("distance", [0.1, 0.01, 0.001])
def test_nearly_equal_maps_lose_hardly_more_than_in_eager(direction, distance):
    """Mean errors over many draws, relative to the true loss and gradient, however small. A loss's rounding
    is one number of random size: the mean of 200 is known to about 5 %, so 20 % more is not luck."""
    draws = 200
    errors = {"cpp": torch.zeros(2), "reference": torch.zeros(2)}
    for seed in range(draws):
        case = Case(shape=(1, 256, 4, 4), direction=direction, distance=distance, seed=seed, magnitude=2.0)
        student, teacher = case.maps()
        kl, _, gradient = losses_and_gradient(case, student.double(), teacher.double(), "reference")
        for backend, sums in errors.items():
            values = losses_and_gradient(case, student, teacher, backend)
            sums += torch.tensor([relative_error(values[0], kl, 0), relative_error(values[2], gradient, 0)])
    assert (errors["cpp"] <= 1.2 * errors["reference"]).all(), errors
    if direction == "student||teacher":  # nothing cancels in this gradient
        assert errors["cpp"][1] / draws < 2e-6


@needs_cpp
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_equal_maps_cost_exactly_nothing(layout):
    for axis, direction, dtype in itertools.product(AXES, DIRECTIONS, BOTH):
        case = Case(
            shape=(2, 37, 9, 11), axis=axis, direction=direction, dtypes=(dtype, dtype), layouts=(layout,) * 2
        )
        student, _ = case.maps()
        kl, mse, gradient = losses_and_gradient(case, student, student.clone(), "cpp")
        assert kl == 0 and mse == 0 and not gradient.any()


@needs_cpp
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("axis", AXES)
def test_growing_logits_replace_the_reference_values(axis, layout):
    """Values that grow along the axis by more than exponentials can hold."""
    for direction, dtype in itertools.product(DIRECTIONS, BOTH):
        case = Case(
            shape=(2, 140, 3, 140),
            axis=axis,
            direction=direction,
            dtypes=(dtype, dtype),
            layouts=(layout,) * 2,
        )
        student, teacher = (t.float() for t in case.maps())
        steps = torch.arange(140.0)
        ramp = steps[:, None, None] if axis == "channel" else steps
        maps = [laid_out(x.to(dtype), layout) for x in (student + 2 * ramp, teacher + 2.0 * ramp)]
        truths = losses_and_gradient(case, *(x.double() for x in maps), "reference")
        eagers = losses_and_gradient(case, *maps, "reference")
        for value, eager, truth in zip(losses_and_gradient(case, *maps, "cpp"), eagers, truths, strict=True):
            bound = max(allowed_error(value), 2 * relative_error(eager, truth, 0))
            assert relative_error(value, truth, 0) < bound


@needs_cpp
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_extreme_logits_stay_finite(dtype, layout):
    for axis, direction in itertools.product(AXES, DIRECTIONS):
        case = Case(
            shape=(2, 48, 4, 16),
            dtypes=(dtype, dtype),
            layouts=(layout, layout),
            axis=axis,
            direction=direction,
            magnitude=1e4,
        )
        maps = case.maps()
        values = losses_and_gradient(case, *maps, "cpp")
        assert all(value.isfinite().all() for value in values)
        truth = losses_and_gradient(case, *(x.double() for x in maps), "reference")
        assert values[0].item() == pytest.approx(truth[0].item(), rel=2e-6)


@pytest.mark.usefixtures("any_level")
@needs_cpp
@pytest.mark.parametrize("layouts", [("contiguous",) * 2, ("channels_last",) * 2, ("contiguous", "tokens")])
def test_nan_spoils_the_losses_and_its_own_distribution_only(layouts):
    for axis, direction, which in itertools.product(AXES, DIRECTIONS, (0, 1)):
        case = Case(shape=(2, 48, 6, 32), axis=axis, direction=direction, layouts=layouts)
        maps = case.maps()
        *_, clean = losses_and_gradient(case, *maps, "cpp")
        maps[which][1, 7, 2, 3] = torch.nan
        kl, mse, spoiled = losses_and_gradient(case, *maps, "cpp")
        assert kl.isnan() and mse.isnan()
        own = torch.zeros(case.shape, dtype=torch.bool)
        own[(1, slice(None), 2, 3) if axis == "channel" else (1, 7, 2)] = True
        assert torch.equal(spoiled[~own], clean[~own])
        if which == 0 or direction == "student||teacher":
            assert spoiled[own].isnan().all()


@pytest.mark.usefixtures("any_level")
@needs_cpp
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("layouts", [("contiguous",) * 2, ("channels_last",) * 2, ("contiguous", "tokens")])
def test_same_bits_on_every_run_and_number_of_threads(layouts, dtype):
    """Outputs are poisoned first, so this also sees every element written."""
    torch.use_deterministic_algorithms(True)
    for axis, direction in itertools.product(AXES, DIRECTIONS):
        case = Case(
            shape=(3, 50, 21, 19), axis=axis, direction=direction, dtypes=(dtype, dtype), layouts=layouts
        )
        maps, results = case.maps(), []
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            results.append(losses_and_gradient(case, *maps, "cpp"))
        for other in results[1:]:
            for value, expected in zip(other, results[0], strict=True):
                assert torch.equal(value, expected) and value.isfinite().all()


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


@needs_cpp
@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set(level, extension):
    best = extension.cpu_capability()
    try:
        extension.set_cpu_capability(level)
    except ValueError:
        pytest.skip(f"this processor lacks {level}")
    try:
        for case, axis, direction in itertools.product(CASES[:13:2], AXES, DIRECTIONS):
            for dtypes in ((torch.float32,) * 2, (torch.bfloat16,) * 2):
                compare(replace(case, axis=axis, direction=direction, dtypes=dtypes))
        test_extreme_logits_stay_finite(torch.float32, "contiguous")
        test_growing_logits_replace_the_reference_values("channel", "contiguous")
        test_growing_logits_replace_the_reference_values("width", "contiguous")
    finally:
        extension.set_cpu_capability(best)
