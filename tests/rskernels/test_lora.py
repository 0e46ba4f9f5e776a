"""lora_linear and lora_qkv: against the formula in float64, equality with linear at B = 0, bits, NaN.

What else the operators promise: test_lora_contract.py.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_cases import DTYPES, as_dtype, compare, gradients, qkv_arguments

import rskernels


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    (
        ((3, 50), 24, 16, (4, 2)),
        ((2100,), 64, 48, (4, 4)),
        ((0,), 5, 3, (1, 1)),
        ((4,), 5, 0, (1, 1)),
        ((4,), 0, 3, (1, 1)),
        ((2, 9), 70, 130, (70, 1)),
    ),
)
def test_qkv_matches_float64_formula(extension, assert_accurate, shape, dtype, bias):
    rows, inputs, dim, ranks = shape
    args = qkv_arguments(dtype, rows=rows, inputs=inputs, dim=dim, ranks=ranks, bias=bias)
    grad = torch.randn(*rows, 3 * dim).to(dtype)
    compare(assert_accurate, args, grad, dtype)


@settings(max_examples=30)
@given(
    rows=st.integers(1, 700),
    inputs=st.integers(1, 200),
    dim=st.integers(1, 200),
    ranks=st.tuples(st.integers(1, 40), st.integers(1, 9)),
    gap=st.integers(0, 5),
    magnitude=st.sampled_from([1e-3, 1.0, 30.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_stride(
    extension, assert_accurate, rows, inputs, dim, ranks, gap, magnitude, dtype, seed
):
    """Rows of x and of the gradient lie `gap` values apart, A and B are transposed views for odd seeds."""
    torch.manual_seed(seed)
    args = qkv_arguments(dtype, rows=(rows,), inputs=inputs, dim=dim, ranks=ranks)
    args[0] = (magnitude * torch.randn(rows, inputs + gap)).to(dtype)[:, :inputs].requires_grad_()
    if seed % 2:
        args[3:] = [t.detach().T.contiguous().T.requires_grad_() for t in args[3:]]
    grad = torch.randn(rows, 3 * dim + gap).to(dtype)[:, : 3 * dim]
    compare(assert_accurate, args, grad, dtype)


@pytest.mark.parametrize("rows", (33, 1500))  # 1500: the merged weight in float32
def test_every_instruction_set(every_level, assert_accurate, rows):
    for dtype in DTYPES:
        args = qkv_arguments(dtype, rows=(rows,), inputs=77, dim=50, ranks=(5, 16))
        compare(assert_accurate, args, torch.randn(rows, 150).to(dtype), dtype)


@pytest.mark.usefixtures("any_level")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", (40, 1100))
def test_same_bits_on_every_run_and_number_of_threads(extension, dtype, rows):
    """Of what our own kernels compute; with W = 0 that is everything. Outputs are poisoned first."""
    torch.use_deterministic_algorithms(True)
    args = qkv_arguments(dtype, rows=(rows,), inputs=72, dim=40)
    args[1].zero_()
    grad = torch.randn(rows, 120)
    results = []
    for count in (1, 2, 2, 3):
        torch.set_num_threads(count)
        results.append(gradients(rskernels.lora_qkv, args, grad))
    for other in results[1:]:
        for value, expected in zip(other, results[0], strict=True):
            assert torch.equal(value, expected) and value.isfinite().all()


@pytest.mark.usefixtures("any_level")
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_row(extension, dtype):
    x, weight, bias, *factors = (t.detach() for t in qkv_arguments(dtype, rows=(70,), ranks=(3, 5)))
    clean = rskernels.lora_qkv(x, weight, bias, *factors, scale=1.0)
    x[41, 3] = torch.nan
    spoiled = rskernels.lora_qkv(x, weight, bias, *factors, scale=1.0)
    assert spoiled[41].isnan().all()
    spoiled[41] = clean[41]
    assert torch.equal(spoiled, clean)


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_values_stay_finite(extension, dtype):
    args = qkv_arguments(dtype, rows=(70,))
    with torch.no_grad():
        args[0].mul_(1e4)
    assert all(t.isfinite().all() for t in gradients(rskernels.lora_qkv, args, 1e4 * torch.randn(70, 48)))


@pytest.mark.usefixtures("any_level")
@pytest.mark.parametrize("dtype", DTYPES)
def test_expanded_gradient(extension, dtype):
    """As sum() gives it: strides of 0."""
    args = qkv_arguments(dtype)
    ones = torch.ones(()).expand(3, 50, 48)
    for value, expected in zip(
        gradients(rskernels.lora_qkv, args, ones),
        gradients(rskernels.lora_qkv, args, ones.contiguous()),
        strict=True,
    ):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_matches_float64_formula(extension, assert_accurate, dtype):
    x = torch.randn(70, 40, dtype=torch.float64).to(dtype).requires_grad_()
    weight, bias = (torch.randn(30, 40) / 6).to(dtype), torch.randn(30).to(dtype)
    a, b = torch.randn(4, 40).to(dtype).requires_grad_(), torch.randn(30, 4).to(dtype).requires_grad_()
    grad = torch.randn(70, 30)

    def merged(x, weight, bias, a, b, *, scale):
        return x @ (weight + scale * b @ a).T + bias

    args = [x, weight, bias, a, b]
    exact = gradients(merged, as_dtype(args, torch.float64), grad)
    with rskernels.backend("reference"):
        eager = gradients(rskernels.lora_linear, as_dtype(args, dtype), grad)
    ours = gradients(rskernels.lora_linear, args, grad)
    for name, out, peer, reference in zip(("y", "x", "a", "b"), ours, eager, exact, strict=True):
        assert_accurate(out, peer, reference, name)


@pytest.mark.parametrize("backend", ("reference", "auto"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", (7, 1500))
def test_zero_b_equals_linear_to_the_last_bit(backend, dtype, rows):
    rskernels.set_backend(backend)
    x, weight, bias, a_q, b_q, a_v, b_v = qkv_arguments(dtype, rows=(rows,), inputs=64, dim=64)
    plain = rskernels.linear(x, weight, bias)
    zero_q, zero_v = torch.zeros_like(b_q), torch.zeros_like(b_v)
    assert torch.equal(rskernels.lora_qkv(x, weight, bias, a_q, zero_q, a_v, zero_v, scale=1.0), plain)
    b = torch.zeros(weight.shape[0], a_q.shape[0], dtype=dtype)
    assert torch.equal(rskernels.lora_linear(x, weight, bias, a_q, b, scale=1.0), plain)


def test_only_q_and_v_are_touched(extension):
    x, weight, bias, *factors = qkv_arguments(torch.float32)
    plain = rskernels.linear(x, weight, bias).chunk(3, -1)
    q, k, v = rskernels.lora_qkv(x, weight, bias, *factors, scale=1.0).chunk(3, -1)
    assert torch.equal(k, plain[1]) and not torch.equal(q, plain[0]) and not torch.equal(v, plain[2])


def test_reference_gradcheck():
    args = as_dtype(qkv_arguments(torch.float32, rows=(2, 3), inputs=4, dim=3, ranks=(2, 1)), torch.float64)
    weight, bias = args[1:3]
    assert torch.autograd.gradcheck(
        lambda x, *factors: rskernels.lora_qkv(x, weight, bias, *factors, scale=0.5), [args[0], *args[3:]]
    )
    a, b = args[3], torch.randn(9, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, a, b: rskernels.lora_linear(x, weight, bias, a, b, scale=0.5), [args[0], a, b]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ((3, 50), (1500,)))
def test_every_element_is_written(extension, dtype, rows):
    torch.use_deterministic_algorithms(True)
    args = qkv_arguments(dtype, rows=rows)
    results = gradients(rskernels.lora_qkv, args, torch.randn(*rows, 48))
    assert all(torch.isfinite(t).all() for t in results)
