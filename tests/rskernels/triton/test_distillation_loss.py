"""distillation_loss's Triton launchers against the reference in float64: losses, statistics, gradient.

On the GPU where there is one, else in Triton's interpreter.
"""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from accuracy import allowed_error
from distillation_loss_cases import (
    LAYOUTS,
    NAMES,
    Case,
    eager_errors,
    laid_out,
    losses_and_gradient,
    relative_error,
    terms,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import rskernels
from rskernels.ops import distillation_loss as operator
from rskernels.ops.distillation_loss import AXES, DIRECTIONS, REDUCTIONS
from rskernels.triton import distillation_loss as launchers
from rskernels.triton import distillation_loss_tiles as tiles
from rskernels.triton.launch import CHIPS, CONFIGS, cdiv, noting

# Triton's interpreter says so of the tops that a map's first values replace, and of a NaN pixel.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|All-NaN slice) encountered:RuntimeWarning")

WEIGHTS = (0.7, 1.3)  # of both losses, as in distillation_loss_cases
HALF = torch.float16


def launched(case, student, teacher, weights=WEIGHTS):
    """kl, mse, gradient and statistics from the launchers, on the CPU."""
    options = tuple(case.options().values())
    kl, mse, stats = launchers.forward(student, teacher, *options)
    grads = [None if w is None else kl.new_tensor(w) for w in weights]
    gradient = launchers.backward(*grads, student, teacher, stats, *options)
    assert gradient.dtype == student.dtype
    assert gradient.stride() == torch.empty_like(student).stride()
    return kl.cpu(), mse.cpu(), gradient.cpu(), stats.cpu()


def on(device, *maps):
    """On another device, in the same layout."""
    return [torch.empty_strided(m.shape, m.stride(), dtype=m.dtype, device=device).copy_(m) for m in maps]


def shift(case, student, teacher):
    """What the kernels' mean of s - t does without: 8 bits of the first s - t, if the second has another
    that is about as large."""
    if torch.float32 not in case.dtypes:
        return 0.0
    dim = 1 if case.axis == "channel" else 3
    s, t = (m.float().movedim(dim, 3).flatten(0, 2)[:, :2] for m in (student, teacher))
    difference = s - t
    first, second = difference[:, 0], difference[:, -1]
    seen = 4096 * first.abs() > torch.maximum(s[:, 0].abs(), t[:, 0].abs())
    cut = (first.view(torch.int32) & -65536).view(torch.float32)
    return torch.where(seen & (4 * (second - first).abs() < first.abs()), cut, 0.0)


def compare(case, device):
    maps = case.maps()
    truths = losses_and_gradient(case, *(m.double() for m in maps), "reference")
    floors = terms(case, *maps)
    eagers = eager_errors(case, *maps, truths, floors)
    *values, stats = launched(case, *on(device, *maps))
    for name, value, eager, truth, floor in zip(NAMES, values, eagers, truths, floors, strict=True):
        bound = max(allowed_error(value), 2 * eager)
        assert relative_error(value, truth, floor) < bound, (name, case)
    *_, expected = operator._forward_composite(*(m.double() for m in maps), *case.options().values())
    assert stats.shape == expected.shape and stats.dtype == torch.float32
    if case.direction == "student||teacher":
        expected[2] -= shift(case, *maps)
    # The mean of s - t is compared with its terms: it may cancel.
    largest = max(m.float().abs().amax().item() for m in maps)
    mean_floor = 0.1 * largest * stats.shape[1] ** 0.5 if case.direction == "student||teacher" else 0.0
    for row, (value, truth) in enumerate(zip(stats, expected, strict=True)):
        error = relative_error(value, truth, mean_floor if row == 2 else 0.0)
        assert error < allowed_error(value), (row, case)


CASES = [
    Case(shape=(2, 64, 8, 8)),
    Case(shape=(2, 37, 7, 9), layouts=("contiguous", "channels")),
    Case(shape=(2, 48, 4, 4), layouts=("channels_last", "tokens")),
    Case(shape=(1, 131, 3, 3), layouts=("channels_last", "channels_last")),
    Case(shape=(1, 300, 2, 3), layouts=("channels_last", "channels_last")),  # more channels than a tile
    Case(shape=(2, 70, 5, 9), layouts=("contiguous", "channels_last")),
    Case(shape=(2, 70, 9, 5), layouts=("tokens", "contiguous"), temperature=3.0),
    Case(shape=(2, 20, 3, 4), layouts=("transposed", "crop"), reduction="batchmean"),
    Case(shape=(2, 9, 5, 32), axis="width"),
    Case(shape=(1, 3, 4, 130), axis="width", layouts=("crop", "channels")),
    Case(shape=(2, 40, 3, 17), axis="width", layouts=("channels_last", "channels_last")),
    Case(shape=(1, 5, 3, 17), axis="width", layouts=("contiguous", "tokens"), temperature=0.5),
    Case(shape=(3, 1, 4, 5)),
    Case(shape=(2, 1, 3, 5), axis="width", layouts=("contiguous", "crop")),
    Case(shape=(3, 5, 4, 1), axis="width"),
    Case(shape=(2, 600, 1, 1), layouts=("contiguous", "channels_last")),
    Case(shape=(1, 700, 3, 5)),  # few distributions: their values are shared out
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_float64_reference(case, device, dtype):
    for direction in DIRECTIONS:
        compare(replace(case, dtypes=(dtype, dtype), direction=direction), device)


@settings(max_examples=12)
@given(
    case=st.builds(
        Case,
        shape=st.tuples(st.integers(1, 2), st.integers(1, 40), st.integers(1, 3), st.integers(1, 20)),
        layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
        dtypes=st.tuples(st.sampled_from((torch.float32, HALF)), st.sampled_from((torch.float32, HALF))),
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
def test_matches_the_float64_reference_on_any_map(case, device):
    compare(case, device)


@pytest.mark.parametrize("weights", [(1.0, None), (None, 2.0)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradient_of_one_loss_alone(direction, weights, device):
    case = Case(direction=direction, temperature=2.0)
    maps = case.maps()
    *_, gradient, _ = launched(case, *on(device, *maps), weights)
    options = tuple(case.options().values())
    grads = [None if w is None else torch.tensor(w).double() for w in weights]
    truth = operator._backward_composite(*grads, *(m.double() for m in maps), torch.empty(0), *options)
    assert relative_error(gradient, truth, 0) < 2e-6


@pytest.mark.parametrize("distance", [0.01, 0.001])
def test_nearly_equal_maps_lose_hardly_more_than_in_eager(distance, device):
    """Mean errors over draws, relative to the true loss and gradient, however small. A distribution's
    rounding is one number of random size: the mean of 16 images of 8 is known to about 10 %, so 30 % more is
    not luck."""
    errors = {"triton": 0.0, "eager": 0.0}
    for seed in range(16):
        case = Case(shape=(1, 256, 1, 8), distance=distance, seed=seed, magnitude=2.0)
        maps = case.maps()
        kl, _, gradient = losses_and_gradient(case, *(m.double() for m in maps), "reference")
        ours, eager = launched(case, *on(device, *maps)), losses_and_gradient(case, *maps, "reference")
        errors["triton"] += relative_error(ours[0], kl, 0)
        errors["eager"] += relative_error(eager[0], kl, 0)
        assert relative_error(ours[2], gradient, 0) < 2e-6  # nothing cancels in it
    assert errors["triton"] <= 1.3 * errors["eager"], errors


def divergence(case, student, teacher):
    """The reference's, and its gradient: that of the error would hide it."""
    student = student.detach().requires_grad_()
    with rskernels.backend("reference"):
        kl, _ = rskernels.distillation_loss(student, teacher, **case.options())
    return kl.detach(), *torch.autograd.grad(kl, student)


@pytest.mark.parametrize("offset", [100.0, -1e4])
@pytest.mark.parametrize("shape", [(1, 384, 2, 6), (1, 700, 3, 1)])  # the second in parts
def test_maps_that_differ_by_a_constant(shape, offset, device):
    """Losses and gradient as near to the truth as everywhere, whichever map is the larger one."""
    for direction, moved in itertools.product(DIRECTIONS, (0, 1)):
        case = Case(shape=shape, direction=direction, layouts=("contiguous", "channels_last"))
        maps = case.maps()
        maps[moved] += offset
        truths = divergence(case, *(m.double() for m in maps))
        eagers = divergence(case, *maps)
        kl, _, gradient, _ = launched(case, *on(device, *maps), (1.0, None))
        for value, eager, truth in zip((kl, gradient), eagers, truths, strict=True):
            bound = max(allowed_error(value), 2 * relative_error(eager, truth, 0))
            assert relative_error(value, truth, 0) < bound, (direction, moved)


@pytest.mark.parametrize("images", [4, 5, 9, 10, 12, 32])
def test_processors_have_about_as_much_to_do(images):
    """Five images of 80 tiles in two parts were 160 programs for 132 processors."""
    maps = [torch.empty(images, 768, 32, 32, dtype=torch.bfloat16) for _ in range(2)]
    with noting(90) as launches:
        launchers.forward(*maps, *Case().options().values())
    grid, constants = launches[0].grid, launches[0].constants
    programs = grid[0] * grid[1]
    tiles = cdiv(cdiv(768, constants["BLOCK_N"]), grid[1])
    values = constants["BLOCK_M"] * constants["BLOCK_N"] * tiles * cdiv(programs, 132) * 132
    assert maps[0].numel() / values > 0.8


def test_rows_that_are_no_multiple_of_16_bytes_are_read_in_long_loads():
    """The 14 x 14 maps of a ViT: 196 values of 2 bytes."""
    maps = [torch.empty(2, 768, 14, 14, dtype=torch.bfloat16) for _ in range(2)]
    with noting(90) as launches:
        kl, mse, stats = launchers.forward(*maps, *Case().options().values())
        launchers.backward(kl, mse, *maps, stats, *Case().options().values())
    for launch in (launches[0], launches[-1]):
        assert (launch.constants["ALIGN"], launch.constants["ALIGN_M"]) == (4, 4)


def test_equal_maps_cost_exactly_nothing(device, dtype):
    for axis, direction, layout in itertools.product(AXES, DIRECTIONS, ("contiguous", "channels_last")):
        case = Case(
            shape=(2, 37, 3, 11), axis=axis, direction=direction, dtypes=(dtype, dtype), layouts=(layout,) * 2
        )
        (student,) = on(device, case.maps()[0])
        kl, mse, gradient, _ = launched(case, student, student.clone())
        assert kl == 0 and mse == 0 and not gradient.any()


@pytest.mark.parametrize("axis", AXES)
def test_growing_logits_raise_the_maxima(axis, device):
    """Values that grow along the axis, over several tiles and parts, by more than exponentials can hold."""
    shape = (1, 600, 1, 3) if axis == "channel" else (1, 2, 3, 600)
    for direction in DIRECTIONS:
        case = Case(shape=shape, axis=axis, direction=direction)
        steps = torch.arange(600.0)
        ramp = steps[:, None, None] if axis == "channel" else steps
        maps = [laid_out(m + 2 * ramp, "contiguous") for m in case.maps()]
        truths = losses_and_gradient(case, *(m.double() for m in maps), "reference")
        eagers = losses_and_gradient(case, *maps, "reference")
        values = launched(case, *on(device, *maps))[:3]
        for value, eager, truth in zip(values, eagers, truths, strict=True):
            bound = max(allowed_error(value), 2 * relative_error(eager, truth, 0))
            assert relative_error(value, truth, 0) < bound


def test_extreme_logits_stay_finite(device, dtype):
    for axis, direction in itertools.product(AXES, DIRECTIONS):
        case = Case(
            shape=(2, 48, 2, 16), dtypes=(dtype, dtype), axis=axis, direction=direction, magnitude=1e4
        )
        maps = case.maps()
        kl, mse, gradient, stats = launched(case, *on(device, *maps))
        assert all(value.isfinite().all() for value in (kl, mse, gradient, stats))
        truth, *_ = losses_and_gradient(case, *(m.double() for m in maps), "reference")
        assert kl.item() == pytest.approx(truth.item(), rel=2e-6)


@pytest.mark.parametrize("layouts", [("contiguous",) * 2, ("channels_last",) * 2, ("contiguous", "tokens")])
def test_nan_spoils_the_losses_and_its_own_distribution_only(layouts, device):
    for axis, direction, which in itertools.product(AXES, DIRECTIONS, (0, 1)):
        case = Case(shape=(2, 8, 3, 4), axis=axis, direction=direction, layouts=layouts)
        maps = on(device, *case.maps())
        *_, clean, _ = launched(case, *maps)
        maps[which][1, 7, 2, 3] = torch.nan
        kl, mse, spoiled, _ = launched(case, *maps)
        assert kl.isnan() and mse.isnan()
        own = torch.zeros(case.shape, dtype=torch.bool)
        own[(1, slice(None), 2, 3) if axis == "channel" else (1, 7, 2)] = True
        assert torch.equal(spoiled[~own], clean[~own])
        if which == 0 or direction == "student||teacher":
            assert spoiled[own].isnan().all()


@pytest.mark.parametrize("shape", [(2, 21, 2, 19), (1, 300, 1, 3)])
def test_same_bits_twice(shape, device, dtype):
    """Outputs are poisoned first, so this also sees every element written."""
    for axis, direction in itertools.product(AXES, DIRECTIONS):
        maps = Case(shape=shape, dtypes=(dtype, dtype), layouts=("contiguous", "channels")).maps()
        case = Case(shape=shape, axis=axis, direction=direction)
        first, second = (launched(case, *on(device, *maps)) for _ in range(2))
        for value, again in zip(first, second, strict=True):
            assert torch.equal(value, again) and value.isfinite().all()


@pytest.mark.parametrize("kernel", ["forward_kernel", "backward_kernel"])
def test_every_tile_is_right(kernel, device, monkeypatch):
    """Those that are shipped and those that a tuner tries, on a map that fills none."""
    rows = []
    for chip in CHIPS:
        shipped = json.loads((CONFIGS / f"distillation_loss.sm{chip}.json").read_text())
        rows += shipped[f"distillation_loss.{kernel}"].values()
    for kind in ("across", "along", "mixed"):
        tried = launchers.candidates(kernel, f"float/{kind}")
        assert 0 < len(tried) <= 12
        rows += tried
    case = Case(shape=(1, 90, 2, 5), layouts=("contiguous", "channels_last"))
    maps = case.maps()
    truths = losses_and_gradient(case, *(m.double() for m in maps), "reference")
    configured = tiles.config

    def chosen(name, *rest):
        return dict(row) if name.endswith(kernel) else configured(name, *rest)

    monkeypatch.setattr(tiles, "config", chosen)
    for row in {(row["BLOCK_M"], row["BLOCK_N"]): row for row in rows}.values():
        for value, truth in zip(launched(case, *on(device, *maps))[:3], truths, strict=True):
            assert relative_error(value, truth, 0) < allowed_error(value), row


@pytest.mark.parametrize(
    ("match", "change"),
    [
        (r"teacher \(2, 5, 3, 3\)", {"teacher": torch.zeros(2, 5, 3, 3)}),
        ("teacher is torch.float64", {"teacher": torch.zeros(2, 5, 3, 4).double()}),
        ("axis 'height'", {"axis": "height"}),
        ("reduction 'sum'", {"reduction": "sum"}),
        ("temperature 0.0", {"temperature": 0.0}),
    ],
)
def test_a_direct_call_that_does_not_fit_is_refused(match, change):
    student, teacher = torch.zeros(2, 5, 3, 4), torch.zeros(2, 5, 3, 4)
    call = {"student": student, "teacher": teacher, **Case().options()} | change
    with pytest.raises(ValueError, match=match):
        launchers.forward(**call)
    good = {"student": student, "teacher": teacher, **Case().options()}
    with pytest.raises(ValueError, match=r"shape \(3, 23\)"):
        launchers.backward(None, None, stats=torch.zeros(3, 23), **good)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("layouts", [("contiguous",) * 2, ("channels_last",) * 2])
def test_public_operator_on_the_device(layouts, dtype):
    case = Case(shape=(2, 96, 8, 8), layouts=layouts, dtypes=(dtype, dtype), temperature=2.0)
    maps = case.maps()
    truths = losses_and_gradient(case, *(m.double() for m in maps), "reference")
    student, teacher = on("cuda", *maps)
    student.requires_grad_()
    tail = tuple(case.options().values())
    torch.library.opcheck(torch.ops.rskernels.distillation_loss_forward.default, (student, teacher, *tail))

    def loss(s, t):
        return rskernels.distillation_loss(s, t, **case.options())

    with rskernels.backend("triton"):
        for form in (loss, torch.compile(loss, fullgraph=True)):
            kl, mse = form(student, teacher)
            (gradient,) = torch.autograd.grad((kl, mse), student, [kl.new_tensor(w) for w in WEIGHTS])
            for value, truth in zip((kl, mse, gradient), truths, strict=True):
                assert relative_error(value.cpu(), truth, 0) < allowed_error(value)
