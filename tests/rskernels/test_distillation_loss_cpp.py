"""distillation_loss: the C++ kernel against the reference in float64, losses and gradient; bits, NaN.

What else the operator promises: test_distillation_loss.py and test_distillation_loss_contract.py.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from accuracy import allowed_error
from distillation_loss_cases import (
    BOTH,
    CASES,
    LAYOUTS,
    Case,
    compare,
    laid_out,
    losses_and_gradient,
    needs_cpp,
    relative_error,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from rskernels.ops.distillation_loss import AXES, DIRECTIONS, REDUCTIONS


@needs_cpp
@pytest.mark.parametrize("dtypes", list(itertools.product(BOTH, repeat=2)), ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_float64_reference(case, dtypes):
    for direction in DIRECTIONS:
        compare(replace(case, dtypes=dtypes, direction=direction))


@needs_cpp
@settings(max_examples=60)
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
def test_every_instruction_set(every_level):
    for case, axis, direction in itertools.product(CASES[:13:2], AXES, DIRECTIONS):
        for dtypes in ((torch.float32,) * 2, (torch.bfloat16,) * 2):
            compare(replace(case, axis=axis, direction=direction, dtypes=dtypes))
    test_extreme_logits_stay_finite(torch.float32, "contiguous")
    test_growing_logits_replace_the_reference_values("channel", "contiguous")
    test_growing_logits_replace_the_reference_values("width", "contiguous")
