"""The Triton kernels of lora_linear and lora_qkv against the merged formula in float64."""

import re

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_cases import RESULTS, as_dtype, conditioning, formula, gradients, qkv_arguments

import rskernels
from rskernels.triton import lora, lora_backward
from rskernels.triton.launch import config
from rskernels.triton.lora_parts import as_tf32

SCALE = 0.75


def to(args, device):
    return [None if t is None else t.detach().to(device).requires_grad_(t.requires_grad) for t in args]


def split(args):
    """x, weight, bias, a, b, first_columns, as the private operator takes them."""
    x, weight, bias, a_q, b_q, a_v, b_v = (None if t is None else t.detach() for t in args)
    return x, weight, bias, [a_q, a_v], [b_q, b_v], [0, 2 * (len(weight) // 3)]


def run(args, grad, mask=(True, True, True)):
    """Output, x Aᵀ and the gradients of x and the factors, by name, from the launchers."""
    x, weight, bias, a, b, columns = split(args)
    y, xa = lora.forward(x, weight, bias, a, b, columns, SCALE, mask[2])
    dx, da, db = lora.backward(grad, x, weight, a, b, xa, columns, SCALE, list(mask))
    found = {"y": y, "xa": xa, "x": dx, "a_q": da[0], "b_q": db[0], "a_v": da[1], "b_v": db[1]}
    assert all(value.is_contiguous() for value in found.values())
    return found


def check(assert_accurate, args, grad):
    """The launchers against the formula in float64; eager in the same dtype is the measure."""
    found = run(args, grad)
    exact = gradients(formula, as_dtype(args, torch.float64), grad)
    with rskernels.backend("reference"):
        eager = gradients(rskernels.lora_qkv, as_dtype(args, args[0].dtype), grad)
    xa = found.pop("xa")
    assert xa.dtype == torch.float32
    x, stacked = args[0].detach(), torch.cat([args[3], args[5]]).detach()
    assert_accurate(xa, (x @ stacked.T).float(), x.double() @ stacked.double().T, "xa")
    unavoidable = conditioning(as_dtype(args, torch.float32), exact, grad)
    for (name, out), peer, truth, error in zip(found.items(), eager, exact, unavoidable, strict=True):
        assert out.dtype == args[0].dtype
        assert_accurate(out, peer, truth, name, error if out.dtype == torch.float32 else 0.0)


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize(
    "shape",
    (
        ((3, 50), 24, 16, (4, 2)),
        ((1,), 1, 1, (1, 1)),
        ((2, 9), 70, 130, (70, 1)),  # more ranks than a tile has
    ),
)
def test_qkv_matches_float64_formula(device, dtype, assert_accurate, shape, bias):
    rows, inputs, dim, ranks = shape
    args = to(qkv_arguments(dtype, rows=rows, inputs=inputs, dim=dim, ranks=ranks, bias=bias), device)
    check(assert_accurate, args, torch.randn(*rows, 3 * dim).to(device, dtype))


@pytest.mark.parametrize("most", (2, 32))
def test_slices_of_rows_add_up(device, dtype, assert_accurate, monkeypatch, most):
    monkeypatch.setattr(lora_backward, "SLICE_ROWS", 16)
    monkeypatch.setattr(lora_backward, "MAX_SLICES", most)
    args = to(qkv_arguments(dtype, rows=(75,), inputs=20, dim=13, ranks=(3, 5)), device)
    check(assert_accurate, args, torch.randn(75, 39).to(device, dtype))


@settings(max_examples=5)
@given(
    rows=st.integers(1, 70),
    inputs=st.integers(1, 140),
    dim=st.integers(1, 140),
    ranks=st.tuples(st.integers(1, 40), st.integers(1, 9)),
    gap=st.integers(0, 5),
    magnitude=st.sampled_from([1e-2, 1.0, 30.0]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_stride(device, dtype, assert_accurate, rows, inputs, dim, ranks, gap, magnitude, seed):
    """Rows of x and of the gradient lie `gap` values apart; for odd seeds x, A and B are transposed views."""
    torch.manual_seed(seed)
    args = to(qkv_arguments(dtype, rows=(rows,), inputs=inputs, dim=dim, ranks=ranks), device)
    x = (magnitude * torch.randn(rows, inputs + gap)).to(device, dtype)[:, :inputs]
    if seed % 2:
        x = x.T.contiguous().T
        args[3:] = [t.detach().T.contiguous().T.requires_grad_() for t in args[3:]]
    args[0] = x.requires_grad_()
    check(assert_accurate, args, torch.randn(rows, 3 * dim + gap).to(device, dtype)[:, : 3 * dim])


def test_linear_matches_float64_formula(device, dtype, assert_accurate):
    """One part that updates every column."""
    x, weight, bias, a, b = (
        torch.randn(shape, dtype=torch.float64).to(device, dtype) / 6
        for shape in ((70, 40), (30, 40), (30,), (4, 40), (30, 4))
    )
    grad = torch.randn(70, 30, device=device).to(dtype)
    y, xa = lora.forward(x, weight, bias, [a], [b], [0], SCALE, True)
    dx, [da], [db] = lora.backward(grad, x, weight, [a], [b], xa, [0], SCALE, [True] * 3)

    def by_autograd(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, a, b)]
        x_, a_, b_ = leaves
        out = x_ @ (weight.to(dtype) + SCALE * b_ @ a_).T + bias.to(dtype)
        return [out, *torch.autograd.grad(out, leaves, grad.to(dtype))]

    found, eager, exact = (y, dx, da, db), by_autograd(dtype), by_autograd(torch.float64)
    for name, out, peer, truth in zip(("y", "x", "a", "b"), found, eager, exact, strict=True):
        assert_accurate(out, peer, truth, name)


@pytest.mark.parametrize(
    "rows, inputs, dim",
    [(0, 5, 3), (4, 0, 3), (4, 5, 0)],
)
def test_nothing_of_a_dimension(device, dtype, rows, inputs, dim):
    args = to(qkv_arguments(dtype, rows=(rows,), inputs=inputs, dim=dim), device)
    grad = torch.randn(rows, 3 * dim).to(device, dtype)
    exact = gradients(formula, as_dtype(args, torch.float64), grad)
    found = run(args, grad)
    found.pop("xa")
    for value, truth in zip(found.values(), exact, strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "mask", [(False, True, True), (True, False, True), (True, True, False), (False,) * 3]
)
def test_unwanted_gradients_are_empty_and_change_nothing(device, dtype, mask):
    args = to(qkv_arguments(dtype), device)
    grad = torch.randn(3, 50, 48).to(device, dtype)
    everything, some = run(args, grad), run(args, grad, mask)
    wanted = dict(x=mask[0], a_q=mask[1], a_v=mask[1], b_q=mask[2], b_v=mask[2], xa=mask[2], y=True)
    for name, value in some.items():
        assert torch.equal(value, everything[name]) if wanted[name] else value.numel() == 0, name


def test_zero_b_equals_linear_to_the_last_bit(device, dtype):
    """x Aᵀ beyond float16's range does not spoil it."""
    x, weight, bias, a, b, columns = split(to(qkv_arguments(dtype, inputs=64, dim=64), device))
    plain = torch.ops.rskernels.linear_forward(x, weight, bias, "none", False)[0]
    a, b = [1e4 * a_i for a_i in a], [torch.zeros_like(b_i) for b_i in b]
    assert torch.equal(lora.forward(x, weight, bias, a, b, columns, 10.0, False)[0], plain)


def test_nan_stays_in_its_row(device, dtype):
    args = to(qkv_arguments(dtype, rows=(70,)), device)
    grad = torch.randn(70, 48).to(device, dtype)
    clean = run(args, grad)
    args[0] = args[0].detach().clone()
    args[0][41, 3] = grad[41, 40] = torch.nan
    spoiled = run(args, grad)
    for name in ("y", "xa", "x"):
        assert spoiled[name][41].isnan().all()
        spoiled[name][41] = clean[name][41]
        assert torch.equal(spoiled[name], clean[name]), name


def test_huge_values_stay_finite(device, dtype):
    """x and the gradient near the end of float16's range: where the results are within it, they are right."""
    args = to(qkv_arguments(dtype, inputs=16), device)
    with torch.no_grad():
        args[0].mul_(1e4)
        for t in args[1:]:
            t.mul_(1e-2)
    found = run(args, 1e4 * torch.randn(3, 50, 48).clamp(-4, 4).to(device, dtype))
    assert all(found[name].isfinite().all() for name in ("y", "xa", "x"))


def test_high_ranks_are_rounded_once(device, relative_error):
    """The large product's results, y and dx, once more: not once for some of the ranks, then for others."""
    args = to(qkv_arguments(torch.float16, rows=(40,), inputs=40, dim=24, ranks=(192, 130)), device)
    with torch.no_grad():
        for t in args[3:]:  # updates far below the large product: their own rounding is none of y's
            t.mul_(0.05)
    x, weight, bias, a, b, columns = split(args)
    found = run(args, grad := torch.randn(40, 72).to(device, torch.float16))
    y = torch.ops.rskernels.linear_forward(x, weight, bias, "none", False)[0].double()
    dx = (grad @ weight).double()
    for a_i, b_i, column in zip(a, b, columns, strict=True):
        y[:, column : column + 24] += SCALE * x.double() @ a_i.double().T @ b_i.double().T
        dx += SCALE * grad[:, column : column + 24].double() @ b_i.double() @ a_i.double()
    for name, exact in (("y", y), ("x", dx)):
        assert relative_error(found[name], exact) < 1.05 * relative_error(exact.half(), exact), name


def test_rounding_to_tf32(device):
    """The multiplier would cut the last 13 bits off."""

    @triton.jit
    def kernel(x, out, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(out + at, as_tf32(tl.load(x + at)))

    unit, inf = 2**-10, float("inf")
    cases = [
        (1 + 0.49 * unit, 1),
        (-1 - 0.5 * unit, -1 - unit),
        (1 + 0.51 * unit, 1 + unit),
        (2 - 0.25 * unit, 2),
        (3.4028234e38, inf),
        (-inf, -inf),
        (0, 0),
        (2.0**-140, 0),
    ]
    x = torch.tensor([value for value, _ in cases], device=device)
    out = torch.empty_like(x)
    kernel[(1,)](x, out, BLOCK=len(cases))
    assert out.tolist() == [expected for _, expected in cases]
    # CUDA's own NaN has all bits set.
    nan = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32, device=device).view(torch.float32)
    kernel[(1,)](nan, out, BLOCK=2)
    assert out[:2].isnan().all()


def test_infinity_stays_in_its_part(device, dtype):
    """One update's A or columns of the gradient do not reach the other's."""
    args = to(qkv_arguments(dtype, rows=(40,)), device)
    grad = torch.randn(40, 48).to(device, dtype)
    clean = run(args, grad)
    with torch.no_grad():
        args[5][1, 3] = torch.inf
    grad[7, 40] = torch.nan
    spoiled = run(args, grad)
    assert not spoiled["y"][:, 32:].isfinite().all()
    assert torch.equal(spoiled["y"][:, :32], clean["y"][:, :32])
    for name in ("a_q", "b_q"):
        assert torch.equal(spoiled[name], clean[name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": [torch.zeros(2, 3)]}, "a has shape (2, 3); expected (2, 8)"),
        ({"b": [torch.zeros(4, 3)]}, "a has shape (2, 8); expected (3, 8)"),
        ({"b": [torch.zeros(4)]}, "b has shape (4,); expected 2 dimensions"),
        ({"a": [torch.zeros(0, 8)], "b": [torch.zeros(4, 0)]}, "expected a rank of at least 1"),
        ({"a": []}, "0 of a, 1 of b, 1 columns"),
        ({"first_columns": [10]}, "inside the 12 outputs"),
        ({"first_columns": [-1]}, "inside the 12 outputs"),
        ({"x": torch.zeros(5, 7)}, "x has shape (5, 7); expected (..., 8)"),
        ({"weight": torch.zeros(12, 8).double()}, "weight is torch.float64 on cpu; expected torch.float32"),
        ({"a": [torch.zeros(2, 8).half()]}, "a is torch.float16 on cpu; expected torch.float32"),
        ({"b": [torch.zeros(4, 2, device="meta")]}, "b is torch.float32 on meta; expected"),
        ({"grad": torch.zeros(5, 11)}, "grad has shape (5, 11); expected (5, 12)"),
        ({"xa": torch.zeros(5, 3)}, "xa has shape (5, 3); expected (5, 2)"),
        ({"xa": torch.zeros(5, 2).half()}, "xa is torch.float16 on cpu; expected torch.float32"),
    ],
)
def test_a_direct_call_that_does_not_fit_is_refused(change, message):
    call = {"x": torch.zeros(5, 8), "weight": torch.zeros(12, 8), "a": [torch.zeros(2, 8)]}
    call |= {"b": [torch.zeros(4, 2)], "first_columns": [8], "scale": SCALE}
    for_backward = {"grad": torch.zeros(5, 12), "xa": torch.zeros(5, 2), "mask": [True] * 3}
    if not change.keys() & for_backward.keys():
        with pytest.raises(ValueError, match=f"lora_forward.*{re.escape(message)}"):
            lora.forward(bias=None, keep_xa=True, **call | change)
    with pytest.raises(ValueError, match=f"lora_backward.*{re.escape(message)}"):
        lora.backward(**call | for_backward | change)


def test_same_bits_on_every_run(device, dtype):
    args = to(qkv_arguments(dtype, rows=(90,), inputs=20, dim=9), device)
    grad = torch.randn(90, 27).to(device, dtype)
    first, second = run(args, grad), run(args, grad)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_expanded_gradient(device, dtype):
    """As sum() gives it: strides of 0."""
    args = to(qkv_arguments(dtype), device)
    ones = torch.ones((), dtype=dtype, device=device).expand(3, 50, 48)
    found, expected = run(args, ones), run(args, ones.contiguous())
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_xa_with_any_strides(device, dtype):
    x, weight, _, a, b, columns = split(to(qkv_arguments(dtype), device))
    xa, grad = torch.randn(3, 50, 6, device=device), torch.randn(3, 50, 48).to(device, dtype)
    for strided in (xa.mT.contiguous().mT, xa[:1].expand(3, 50, 6)):
        found, expected = (
            lora.backward(grad, x, weight, a, b, t, columns, SCALE, [False, False, True])[2]
            for t in (strided, strided.contiguous())
        )
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("ranks", ["r16", "r64"])
@pytest.mark.parametrize("kernel", ["project", "add_product", "sum_factor_gradients", "add_slices"])
def test_candidates_fit_their_kernel(kernel, ranks):
    found = lora.candidates(kernel, f"half/{ranks}")
    assert 0 < len(found) <= 12
    shipped = config(f"lora.{kernel}", f"half/{ranks}", torch.device("cpu"))
    assert all(candidate.keys() == shipped.keys() for candidate in found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: C++ would serve")
def test_public_operator_on_a_device(device, dtype, assert_accurate):
    args = to(qkv_arguments(dtype, inputs=64, dim=64), device)
    grad = torch.randn(3, 50, 192).to(device, dtype)
    exact = gradients(formula, as_dtype(args, torch.float64), grad)
    with rskernels.backend("reference"):
        eager = gradients(rskernels.lora_qkv, as_dtype(args, dtype), grad)
    with rskernels.backend("triton"):
        found = gradients(rskernels.lora_qkv, args, grad)
        compiled = gradients(torch.compile(rskernels.lora_qkv, fullgraph=True), args, grad)
        x, weight, bias, a, b, columns = split(args)
        leaves = [[t.requires_grad_() for t in factors] for factors in (a, b)]
        torch.library.opcheck(
            torch.ops.rskernels.lora_forward.default,
            (x.requires_grad_(), weight, bias, *leaves, columns, SCALE, True),
        )
    for name, out, again, peer, truth in zip(RESULTS, found, compiled, eager, exact, strict=True):
        assert_accurate(out, peer, truth, name)
        assert torch.equal(out, again), name
