"""dilated_aspp: the C++ kernel against the reference in float64, output and every gradient; bits, NaN.

What else the operator promises: test_dilated_aspp.py and test_dilated_aspp_contract.py.
"""

import pytest
import torch
from dilated_aspp_cases import BOTH, CASES, Case, compare, leaves, needs_cpp, operator, run
from hypothesis import given, settings
from hypothesis import strategies as st


@needs_cpp
@BOTH
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_float64_reference(case: Case, dtype: torch.dtype, assert_accurate) -> None:
    compare(case, dtype, assert_accurate)


@needs_cpp
@settings(max_examples=40)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_matches_the_float64_reference_on_any_shape(data, dtype: torch.dtype, assert_accurate) -> None:
    n = data.draw(st.integers(1, 3))

    def several(low: int, high: int) -> st.SearchStrategy:
        return st.lists(st.integers(low, high), min_size=n, max_size=n).map(tuple)

    case = data.draw(
        st.builds(
            Case,
            batch=st.integers(1, 3),
            inputs=several(1, 40),
            outputs=several(1, 40),
            height=st.integers(1, 20),
            width=st.integers(1, 20),
            dilations=several(1, 20),
            shared=st.booleans(),
            bias=st.booleans(),
            norm=st.booleans(),
            activation=st.sampled_from(operator.ACTIVATIONS),
            projection=st.integers(0, 20),
            magnitude=st.sampled_from([0.01, 1.0, 100.0]),
            seed=st.integers(0, 2**16),
        )
    )
    compare(case, dtype, assert_accurate)


@needs_cpp
@BOTH
@pytest.mark.parametrize("inputs", [1, 7, 33])
def test_weights_in_either_layout_give_the_same_bits(dtype: torch.dtype, inputs: int) -> None:
    case = Case(inputs=(inputs,), outputs=(19,), dilations=(2,))
    found, grad = leaves(case.tensors(), dtype), case.grad().to(dtype)
    expected = run(case, found, grad)
    weight = found["w0"].detach().contiguous(memory_format=torch.channels_last)
    for name, value in run(case, found | {"w0": weight.requires_grad_()}, grad).items():
        assert torch.equal(value, expected[name]), name


@needs_cpp
@BOTH
def test_every_element_is_written(dtype: torch.dtype) -> None:
    torch.use_deterministic_algorithms(True)  # fills empty tensors with NaN
    for case in CASES:
        for name, value in run(case, leaves(case.tensors(), dtype), case.grad()).items():
            assert value.isfinite().all(), (name, case)


@pytest.mark.usefixtures("any_level")
@needs_cpp
@BOTH
def test_equal_bits_from_run_to_run_and_for_any_threads(dtype: torch.dtype) -> None:
    # PyTorch's products stand behind the projection's gradients: those are left out for two threads.
    for case in (Case(height=20, width=19, norm=True), Case(inputs=(16,), shared=True, height=30, width=30)):
        found = leaves(case.tensors(), dtype)
        torch.set_num_threads(1)
        once, again = run(case, found, case.grad()), run(case, found, case.grad())
        torch.set_num_threads(2)
        two = run(case, found, case.grad())
        for name, value in once.items():
            assert torch.equal(value, again[name]) and torch.equal(value, two[name]), name
    case = Case(height=20, width=19, projection=24)
    found = leaves(case.tensors(), dtype)
    two = run(case, found, case.grad())["out"]
    torch.set_num_threads(1)
    assert torch.equal(run(case, found, case.grad())["out"], two)


@needs_cpp
@BOTH
def test_every_instruction_set(every_level: str, dtype: torch.dtype, assert_accurate) -> None:
    for case in CASES[:3]:
        compare(case, dtype, assert_accurate)


@pytest.mark.usefixtures("any_level")
@needs_cpp
@BOTH
def test_nan_spoils_what_it_reaches_only(dtype: torch.dtype) -> None:
    case = Case(inputs=(8,), outputs=(4,), dilations=(3,), batch=1)
    found = {name: t.detach() for name, t in leaves(case.tensors(), dtype).items()}
    clean = case.call(found)
    found["x0"][0, 2, 4, 5] = torch.nan
    out = case.call(found)
    reached = torch.zeros(9, 11, dtype=torch.bool)
    reached[1:8:3, 2:9:3] = True
    assert out[0, :, reached].isnan().all()
    assert torch.equal(out[0, :, ~reached], clean[0, :, ~reached])


@needs_cpp
@BOTH
def test_large_values(dtype: torch.dtype) -> None:
    for activation in operator.ACTIVATIONS:
        case = Case(activation=activation, magnitude=1e4)
        for name, value in run(case, leaves(case.tensors(), dtype), case.grad()).items():
            assert value.isfinite().all(), (activation, name)
