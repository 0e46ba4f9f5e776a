"""cross_attention on the CPU: the C++ kernels against the float64 reference; bits, NaN and huge logits.

What else the operator promises: test_cross_attention.py and test_cross_attention_contract.py.
"""

from dataclasses import replace

import pytest
import torch
from cross_attention_cases import CASES, DTYPES, NAMES, Case, compare, needs_cpp, run
from hypothesis import given, settings
from hypothesis import strategies as st

import rskernels


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_float64_reference(case: Case, dtype: torch.dtype) -> None:
    compare(case, dtype)


@needs_cpp
@settings(max_examples=60)
@given(
    case=st.builds(
        Case,
        batch=st.integers(1, 3),
        heads=st.integers(1, 4),
        queries=st.integers(1, 150) | st.integers(1, 12),
        keys=st.integers(1, 700) | st.integers(1, 12),
        dim=st.integers(1, 128) | st.sampled_from([16, 32, 64, 256]),
        density=st.sampled_from([None, 0.02, 0.5]),
        drop=st.booleans(),
        shared=st.tuples(st.booleans(), st.booleans()),
        layout=st.sampled_from(["tokens", "heads", "channels"]),
        magnitude=st.sampled_from([0.1, 1.0]),  # logits up to some 50; beyond, finite is all that is asked
        scale=st.sampled_from([None, 0.3]),
        seed=st.integers(0, 2**16),
    ),
    dtype=st.sampled_from(DTYPES),
)
def test_matches_the_float64_reference_on_any_shape(case: Case, dtype: torch.dtype) -> None:
    compare(case, dtype)


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[3]], ids=str)
def test_huge_logits_stay_finite(case: Case, dtype: torch.dtype) -> None:
    leaves, mask, grad = case.inputs(dtype)
    leaves = [(100 * leaf).detach().requires_grad_() for leaf in leaves[:2]] + leaves[2:]
    assert (leaves[0] @ leaves[1].transpose(2, 3) * case.dim**-0.5).abs().max() > 1e4
    for value in run(case, leaves, mask, grad, "cpp"):
        assert value.isfinite().all()


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[3], CASES[6]], ids=str)
def test_nan_query_spoils_its_own_row_only(case: Case, dtype: torch.dtype) -> None:
    (q, k, v), mask, _ = case.inputs(dtype)
    q, k, v = q.detach(), k.detach(), v.detach()
    with rskernels.backend("cpp"):
        clean = rskernels.cross_attention(q, k, v, mask=mask)
        q[0, 1, 3, 0] = torch.nan
        spoiled = rskernels.cross_attention(q, k, v, mask=mask)
    assert spoiled[0, 1, 3].isnan().all()
    spoiled[0, 1, 3] = clean[0, 1, 3]
    assert torch.equal(spoiled, clean)


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_key_spoils_every_row_that_sees_it(dtype: torch.dtype) -> None:
    (q, k, v), _, _ = CASES[6].inputs(dtype)
    with torch.no_grad(), rskernels.backend("cpp"):
        k[0, 1, 400, 3] = torch.nan
        out = rskernels.cross_attention(q, k, v)
    assert out[0, 1].isnan().all() and out[0, 0].isfinite().all()


@needs_cpp
def test_dropped_value_counts_for_nothing_even_if_nan() -> None:
    case = CASES[4]
    leaves, mask, grad = case.inputs(torch.float32)
    expected = run(case, leaves, mask, grad, "cpp")
    with torch.no_grad():
        leaves[2][:, :, 0] = torch.nan
    values = run(case, leaves, mask, grad, "cpp")
    assert not values[3][:, :, 0].any()
    for value, truth in zip(values, expected, strict=True):
        assert torch.equal(value, truth)


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [CASES[i] for i in (0, 1, 3, 5, 6, 13, 14)], ids=str)
def test_same_bits_on_every_run_and_number_of_threads(case: Case, dtype: torch.dtype) -> None:
    """Outputs are poisoned first, so this also sees every element written."""
    torch.use_deterministic_algorithms(True)
    results = []
    for count in (1, 2, 2, 3):
        torch.set_num_threads(count)
        results.append(run(case, *case.inputs(dtype), "cpp"))
    for other in results[1:]:
        for name, value, expected in zip(NAMES, other, results[0], strict=True):
            assert torch.equal(value, expected) and value.isfinite().all(), name


@needs_cpp
def test_every_instruction_set(every_level: str) -> None:
    """Each kernel, with and without a mask."""
    for each in (*CASES[:4], *CASES[5:]):
        small = replace(each, heads=min(each.heads, 3))
        compare(small, torch.float32)
        compare(small, torch.bfloat16)
