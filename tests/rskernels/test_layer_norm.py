"""layer_norm: every backend against float64, its gradients in every mix of dtypes, its errors."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rskernels
from rskernels.ops.layer_norm import layer_norm_reference

DTYPES = [torch.float32, torch.bfloat16]


def arguments(
    *shape: int, dtype=torch.float32, weights=torch.float32, spread: float = 1.0, mean: float = 0.5
):
    x = (torch.randn(shape) * spread + mean).to(dtype).requires_grad_()
    weight = torch.randn(shape[-1]).to(weights).requires_grad_()
    bias = torch.randn(shape[-1]).to(weights).requires_grad_()
    return x, weight, bias


def results(form, tensors, grad: Tensor, **options) -> list[Tensor]:
    out = form(*tensors, **options)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad.to(out.dtype))]


def in_float64(tensors, grad: Tensor, eps: float = 1e-6) -> list[Tensor]:
    wide = [t.detach().double().requires_grad_() for t in tensors]
    return results(lambda x, w, b: F.layer_norm(x, w.shape, w, b, eps), wide, grad.double())


def eager(x: Tensor, weight: Tensor, bias: Tensor, dtype=None) -> Tensor:
    return layer_norm_reference(x, weight, bias, 1e-6, dtype or x.dtype)


def compare(assert_accurate, tensors, grad: Tensor, dtype=None) -> None:
    found = results(rskernels.layer_norm, tensors, grad, dtype=dtype)
    peers = results(eager, tensors, grad, dtype=dtype)
    for what, *triple in zip(("y", "dx", "dw", "db"), found, peers, in_float64(tensors, grad), strict=True):
        assert_accurate(*triple, what)


@pytest.mark.parametrize("result", DTYPES)
@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(any_backend, assert_accurate, dtype, weights, result) -> None:
    tensors = arguments(3, 41, 50, dtype=dtype, weights=weights)
    compare(assert_accurate, tensors, torch.randn(3, 41, 50).to(result), result)


@settings(max_examples=25)
@given(
    rows=st.integers(1, 700),
    dim=st.integers(5, 130),  # of one channel nothing is left, of two their order
    dtype=st.sampled_from(DTYPES),
    result=st.sampled_from(DTYPES),
    spread=st.sampled_from([1e-2, 1.0, 1e3]),
    strided=st.booleans(),
)
def test_any_shape(extension, assert_accurate, rows, dim, dtype, result, spread, strided) -> None:
    tensors = arguments(rows, dim, dtype=dtype, spread=spread, mean=spread)
    x = tensors[0].detach()
    if strided:
        x = x.T.contiguous().T
    compare(assert_accurate, (x.requires_grad_(), *tensors[1:]), torch.randn(rows, dim).to(result), result)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(every_level, assert_accurate, dtype) -> None:
    compare(assert_accurate, arguments(70, 75, dtype=dtype), torch.randn(70, 75).to(dtype))


@pytest.mark.usefixtures("any_level")
@pytest.mark.parametrize("mean", [0, 100, 1000, 1e5])
def test_large_mean_loses_no_digits(extension, relative_error, mean) -> None:
    """Of the result; of x itself, rounded when it was made, nothing more is known."""
    x = torch.randn(8, 257) + mean
    weight, bias = torch.ones(257), torch.zeros(257)
    expected = F.layer_norm(x.double(), (257,), eps=1e-6)
    assert relative_error(rskernels.layer_norm(x, weight, bias), expected) < 1e-6


def test_one_channel_is_the_bias(extension) -> None:
    x, weight, bias = arguments(5, 1)
    y, dx, dw, db = results(rskernels.layer_norm, (x, weight, bias), torch.ones(5, 1))
    assert torch.equal(y, bias.detach().expand(5, 1)) and not dx.any() and not dw.any() and db == 5


@pytest.mark.usefixtures("any_level")
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_spoils_its_own_row(any_backend, dtype) -> None:
    x, weight, bias = arguments(6, 33, dtype=dtype)
    x = x.detach()
    x[2, 5] = float("nan")
    y = rskernels.layer_norm(x, weight.detach(), bias.detach())
    assert y[2].isnan().all() and y[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element_is_written(extension, dtype) -> None:
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    tensors = arguments(1000, 45, dtype=dtype)
    found = results(rskernels.layer_norm, tensors, torch.randn(1000, 45))
    assert all(t.isfinite().all() for t in found)


def test_no_rows(any_backend) -> None:
    tensors = arguments(0, 16)
    y, dx, dw, db = results(rskernels.layer_norm, tensors, torch.empty(0, 16))
    assert y.shape == dx.shape == (0, 16) and not dw.any() and not db.any()


@pytest.mark.usefixtures("any_level")
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_bits(extension, dtype) -> None:
    """From run to run, and for one thread and two."""
    tensors, grad = arguments(3000, 96, dtype=dtype), torch.randn(3000, 96)
    runs = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        runs.append(results(rskernels.layer_norm, tensors, grad))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.usefixtures("any_level")
@pytest.mark.parametrize("wanted", range(1, 8))
def test_partial_gradients(any_backend, relative_error, wanted) -> None:
    tensors, grad = arguments(40, 20), torch.randn(40, 20)
    expected = in_float64(tensors, grad)[1:]
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(bool(wanted >> i & 1))
    rskernels.layer_norm(*tensors).backward(grad)
    for tensor, right in zip(tensors, expected, strict=True):
        assert (tensor.grad is not None) == tensor.requires_grad
        assert tensor.grad is None or relative_error(tensor.grad, right) < 2e-6


def test_gradients_that_are_not_contiguous(extension, relative_error) -> None:
    tensors, grad = arguments(4, 30, 24), torch.randn(24, 30, 4).permute(2, 1, 0)
    for found, right in zip(
        results(rskernels.layer_norm, tensors, grad), in_float64(tensors, grad), strict=True
    ):
        assert relative_error(found, right) < 2e-6
    expanded = torch.ones(()).expand(4, 30, 24)
    for found, right in zip(
        results(rskernels.layer_norm, tensors, expanded), in_float64(tensors, expanded), strict=True
    ):
        assert found.isfinite().all() and found.shape == right.shape


def test_bias_of_another_dtype(extension) -> None:
    x, weight, bias = arguments(9, 16)
    low = bias.detach().bfloat16().requires_grad_()
    rskernels.layer_norm(x, weight, low).sum().backward()
    assert low.grad.dtype == torch.bfloat16 and torch.equal(low.grad, torch.full((16,), 9.0).bfloat16())


def test_autocast_changes_nothing(extension) -> None:
    x, weight, bias = arguments(9, 16)
    plain = rskernels.layer_norm(x, weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rskernels.layer_norm(x, weight, bias), plain)


def test_float64_gradcheck() -> None:
    tensors = [t.detach().double().requires_grad_() for t in arguments(3, 4, 6)]
    assert torch.autograd.gradcheck(lambda *t: rskernels.layer_norm(*t), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: rskernels.layer_norm(*t), tensors)


def test_second_derivative_is_an_error(extension) -> None:
    tensors = arguments(3, 16)
    (dx,) = torch.autograd.grad(rskernels.layer_norm(*tensors).square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(extension, dtype) -> None:
    x, weight, bias = arguments(5, 16, dtype=dtype)
    forward = torch.ops.rskernels.layer_norm_forward.default
    torch.library.opcheck(forward, (x, weight, bias, 1e-6, torch.float32))
    _, mean, rstd = forward(x.detach(), weight, bias, 1e-6, dtype)
    backward = torch.ops.rskernels.layer_norm_backward.default
    inputs = (torch.randn(5, 16), x.detach(), weight.detach(), mean.detach(), rstd.detach())
    for mask in ([True, True, True], [False, True, False]):
        torch.library.opcheck(backward, (*inputs, mask))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(extension, dynamic) -> None:
    compiled = torch.compile(rskernels.layer_norm, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (4, 7):
        tensors, grad = arguments(rows, 16), torch.randn(rows, 16)
        for found, right in zip(
            results(compiled, tensors, grad), results(rskernels.layer_norm, tensors, grad), strict=True
        ):
            torch.testing.assert_close(found, right)


def test_exports(extension) -> None:
    class Norm(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return rskernels.layer_norm(x, weight, bias)

    tensors = tuple(t.detach() for t in arguments(5, 16))
    exported = torch.export.export(
        Norm(), tensors, dynamic_shapes=({0: torch.export.Dim("rows")}, None, None)
    )
    x = torch.randn(9, 16)
    assert torch.equal(exported.module()(x, *tensors[1:]), rskernels.layer_norm(x, *tensors[1:]))


ones = torch.ones


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: rskernels.layer_norm(ones(2, 3), ones(4), ones(4)), ValueError, r"x has shape \(2, 3\)"),
        (lambda: rskernels.layer_norm(ones(()), ones(4), ones(4)), ValueError, r"x has shape \(\)"),
        (lambda: rskernels.layer_norm(ones(2, 4), ones(4), ones(3)), ValueError, "bias has shape"),
        (lambda: rskernels.layer_norm(ones(2, 4), ones(4, 1), ones(4, 1)), ValueError, "weight has shape"),
        (lambda: rskernels.layer_norm(ones(2, 0), ones(0), ones(0)), ValueError, "weight has shape"),
        (lambda: rskernels.layer_norm(ones(2, 4).int(), ones(4), ones(4)), TypeError, "x is torch.int32"),
        (lambda: rskernels.layer_norm(ones(2, 4), ones(4), ones(4), dtype=torch.int), TypeError, "dtype is"),
        (lambda: rskernels.layer_norm(ones(2, 4), ones(4, device="meta"), ones(4)), ValueError, "on meta"),
        (lambda: rskernels.layer_norm(ones(2, 4), ones(4), ones(4), eps=-1e-6), ValueError, "eps is -1e-06"),
        (lambda: rskernels.layer_norm(ones(2, 4), ones(4), ones(4), eps=torch.nan), ValueError, "eps is nan"),
        (lambda: rskernels.layer_norm(ones(2, 4), ones(4), ones(4), eps=None), TypeError, "eps is None"),
    ],
)
def test_errors(call, error, message) -> None:
    with pytest.raises(error, match=f"layer_norm: .*{message}"):
        call()


def test_named_backend_that_cannot_serve(extension) -> None:
    x, weight, bias = arguments(2, 16)
    with rskernels.backend("cpp"), pytest.raises(ValueError, match="cannot serve layer_norm"):
        rskernels.layer_norm(x, weight, bias, dtype=torch.float16)
