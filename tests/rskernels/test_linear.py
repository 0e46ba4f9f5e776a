"""linear: C++ against the reference in float64, every gradient, both products, compilation, memory."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import rskernels
from rskernels import tuning
from rskernels.ops.linear import ACTIVATIONS, linear_reference

DTYPES = (torch.float32, torch.bfloat16)


def use_product(name):
    tuning.restore({**tuning.record(), "products": dict.fromkeys(tuning.KEYS, name)})


def arguments(shape, inputs, outputs, dtype, *, bias=True, magnitude=1.0):
    x = torch.randn(*shape, inputs, dtype=torch.float64) * magnitude
    weight = torch.randn(outputs, inputs, dtype=torch.float64) / max(inputs, 1) ** 0.5
    b = torch.randn(outputs, dtype=torch.float64) if bias else None
    return [None if t is None else t.to(dtype).requires_grad_() for t in (x, weight, b)]


def evaluate(call, leaves, grad_output):
    """The output and the gradient of every leaf."""
    out = call(*leaves)
    present = [leaf for leaf in leaves if leaf is not None]
    return [out, *torch.autograd.grad(out, present, grad_output.to(out.dtype))]


def conditioning(leaves, activation, grad):
    """Relative errors of y, dx, dW and db that come from sums whose terms are off by what is allowed,
    independently of each other: more than that where a sum is nearly zero, as one number may be, and where
    huge pre-activations, off by half of what float32 allows their size, change the derivative near 0."""
    x, weight, bias = (None if t is None else t.detach().double() for t in leaves)
    x, grad = x.reshape(-1, weight.shape[1]), grad.double().reshape(-1, weight.shape[0])
    pre = F.linear(x, weight, bias)
    if not pre.numel():
        return [0.0] * 4

    def activated(at):
        return linear_reference(at, torch.eye(at.shape[1], dtype=at.dtype), None, activation)

    def derivative(at):
        at = at.detach().requires_grad_()
        return torch.autograd.grad(activated(at).sum(), at)[0]

    slope, step = derivative(pre), 1e-6 * pre.square().mean().sqrt()
    change = torch.maximum(*((derivative(pre + s) - slope).abs() for s in (step, -step)))
    allowed = {torch.float32: 2e-6, torch.bfloat16: 5e-3}[leaves[0].dtype]
    value = grad * slope
    variance = (allowed * value).square() + (grad * change).square()
    squares = F.linear(x.square(), weight.square(), None if bias is None else bias.square())
    pairs = (
        ((allowed * slope).square() * squares, activated(pre)),
        (variance @ weight.square(), value @ weight),
        (variance.T @ x.square(), value.T @ x),
        (variance.sum(0), value.sum(0)),
    )
    return [(v.sum().sqrt() / result.norm().clamp_min(1e-30)).item() for v, result in pairs]


def check_against_float64(assert_accurate, leaves, activation):
    def copies(dtype):
        return [None if t is None else t.detach().to(dtype).requires_grad_() for t in leaves]

    grad = torch.randn(*leaves[0].shape[:-1], leaves[1].shape[0], dtype=leaves[0].dtype)
    with rskernels.backend("cpp"):
        ours = evaluate(lambda *a: rskernels.linear(*a, activation), leaves, grad)
    eager = evaluate(lambda *a: linear_reference(*a, activation), copies(leaves[0].dtype), grad)
    exact = evaluate(lambda *a: linear_reference(*a, activation), copies(torch.float64), grad)
    unavoidable = conditioning(leaves, activation, grad)
    for name, *values, error in zip(("y", "dx", "dW", "db"), ours, eager, exact, unavoidable, strict=False):
        assert_accurate(*values, f"{name} {activation}", error)


@pytest.mark.parametrize("product", tuning.PRODUCTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64_reference(extension, assert_accurate, dtype, activation, product):
    use_product(product)
    for shape, inputs, outputs in (
        ((2, 130), 96, 160),
        ((3,), 5, 7),
        ((), 16, 8),
        ((2, 0), 4, 3),
        ((40, 1), 1, 1),
    ):
        for bias in (True, False):
            leaves = arguments(shape, inputs, outputs, dtype, bias=bias)
            check_against_float64(assert_accurate, leaves, activation)


@settings(max_examples=60)
@given(
    rows=st.integers(1, 200),
    inputs=st.integers(1, 200),
    outputs=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(ACTIVATIONS),
    product=st.sampled_from(tuning.PRODUCTS),
    magnitude=st.sampled_from((1e-3, 1.0, 1e3)),
    layout=st.sampled_from(("dense", "transposed", "sliced", "expanded")),
    seed=st.integers(0, 2**31),
)
def test_any_shape_stride_and_magnitude(
    extension, assert_accurate, rows, inputs, outputs, dtype, activation, product, magnitude, layout, seed
):
    torch.manual_seed(seed)
    use_product(product)
    x, weight, bias = arguments((rows,), inputs, outputs, dtype, magnitude=magnitude)
    with torch.no_grad():
        if layout == "transposed":
            x, weight = x.t().contiguous().t(), weight.t().contiguous().t()
        elif layout == "sliced":
            x = torch.cat([x, x], dim=1)[:, inputs:]
            weight = weight.repeat_interleave(2, dim=0)[::2]
        elif layout == "expanded":
            x = x[:1].expand(rows, inputs)
            bias = bias[:1].expand(outputs)
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    check_against_float64(assert_accurate, leaves, activation)


@pytest.mark.parametrize("product", tuning.PRODUCTS)
def test_long_sums_stay_accurate(extension, assert_accurate, product):
    """The weight gradient sums over all rows: 20,000 of them."""
    use_product(product)
    check_against_float64(assert_accurate, arguments((20_000,), 24, 40, torch.float32), None)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_gradcheck(activation):
    leaves = arguments((2, 3), 4, 5, torch.float64)
    assert torch.autograd.gradcheck(lambda *a: rskernels.linear(*a, activation), leaves)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype, activation):
    x, weight, bias = arguments((3, 4), 6, 5, dtype)
    name = activation or "none"
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    forward = torch.ops.rskernels.linear_forward.default
    for b in (bias, None):
        torch.library.opcheck(forward, (x, weight, b, name, True), test_utils=tests)
    out, pre = forward(x.detach(), weight.detach(), bias.detach(), name, True)
    saved = out if activation == "relu" else pre
    for mask in itertools.product((True, False), repeat=3):
        args = (torch.randn_like(out), x.detach(), weight.detach(), saved, name, mask)
        backward = torch.ops.rskernels.linear_backward.default
        torch.library.opcheck(backward, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("product", tuning.PRODUCTS)
def test_no_inputs_no_outputs_no_rows(extension, product):
    use_product(product)
    for rows, inputs, outputs in ((3, 0, 4), (3, 4, 0), (0, 4, 5), (0, 0, 4)):
        leaves = arguments((rows,), inputs, outputs, torch.float32)
        with rskernels.backend("cpp"):
            y, dx, dw, db = evaluate(rskernels.linear, leaves, torch.ones(rows, outputs))
        assert torch.equal(y, leaves[2].expand(rows, outputs))
        assert not dx.any() and not dw.any() and torch.equal(db, torch.full((outputs,), float(rows)))


def test_python_implementation_equals_the_extension(extension, relative_error):
    """What serves a pure-Python install: the same operator on the meta-free Python path."""
    from rskernels.ops.linear import _backward_reference, _forward_reference

    x, weight, bias = (t.detach() for t in arguments((9,), 12, 8, torch.float32))
    for activation in ("none", "gelu", "gelu_tanh", "relu"):
        ours = torch.ops.rskernels.linear_forward(x, weight, bias, activation, True)
        plain = _forward_reference(x, weight, bias, activation, True)
        saved = ours[0] if activation == "relu" else ours[1]
        grad = torch.randn_like(ours[0])
        ours += torch.ops.rskernels.linear_backward(grad, x, weight, saved, activation, [True] * 3)
        plain += _backward_reference(grad, x, weight, saved, activation, [True] * 3)
        for a, b in zip(ours, plain, strict=True):
            assert a.numel() == b.numel() and (a.numel() == 0 or relative_error(a, b) < 2e-6)


@pytest.mark.parametrize("wanted", list(itertools.product((True, False), repeat=3)))
def test_only_wanted_gradients_are_computed_and_saved(extension, wanted):
    rskernels.set_backend("cpp")
    leaves = [
        t.detach().requires_grad_(w)
        for t, w in zip(arguments((30,), 8, 6, torch.float32), wanted, strict=True)
    ]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        out = rskernels.linear(*leaves)
    if not any(wanted):
        assert not out.requires_grad and not saved
        return
    assert (leaves[0].data_ptr() in saved) == wanted[1]
    assert (leaves[1].data_ptr() in saved) == wanted[0]
    out.sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == list(wanted)
    for leaf, want in zip(leaves, wanted, strict=True):
        if want:
            expected = torch.autograd.grad(F.linear(*leaves).sum(), leaf)[0]
            torch.testing.assert_close(leaf.grad, expected)


def test_inference_keeps_no_pre_activation(extension):
    x, weight, bias = (t.detach() for t in arguments((30,), 8, 6, torch.float32))
    assert torch.ops.rskernels.linear_forward(x, weight, bias, "gelu", False)[1].numel() == 0
    weight.requires_grad_()
    with pytest.raises(ValueError, match="keep_pre"):
        torch.ops.rskernels.linear_forward(x, weight, bias, "gelu", False)


def test_second_derivative_is_an_error_that_names_the_way_out(extension):
    rskernels.set_backend("cpp")
    x, weight, bias = arguments((4,), 3, 2, torch.float32)
    (dx,) = torch.autograd.grad(rskernels.linear(x, weight, bias, "gelu").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*backend\('reference'\)"):
        dx.sum().backward()
    with rskernels.backend("reference"):
        (dx,) = torch.autograd.grad(rskernels.linear(x, weight, bias, "gelu").sum(), x, create_graph=True)
    dx.sum().backward()
    assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dynamic", (False, True))
def test_compiles_as_one_graph(extension, dynamic):
    leaves = arguments((7,), 12, 8, torch.float32)
    compiled = torch.compile(
        lambda *a: rskernels.linear(*a, "gelu"), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    grad = torch.randn(7, 8)
    for ours, plain in zip(
        evaluate(compiled, leaves, grad),
        evaluate(lambda *a: rskernels.linear(*a, "gelu"), leaves, grad),
        strict=True,
    ):
        assert torch.equal(ours, plain)


def test_exports_with_dynamic_rows(extension):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(12, 8)

        def forward(self, x):
            return rskernels.linear(x, self.inner.weight, self.inner.bias, "gelu")

    layer = Layer().requires_grad_(False)
    rows = torch.export.Dim("rows", min=1, max=4096)
    program = torch.export.export(layer, (torch.randn(5, 12),), dynamic_shapes={"x": {0: rows}})
    assert any("linear_forward" in str(node.target) for node in program.graph.nodes)
    x = torch.randn(33, 12)
    assert torch.equal(program.module()(x), layer(x))


@pytest.mark.parametrize("backend", ("reference", "auto", "cpp"))
def test_autocast_and_mixed_dtypes(request, backend):
    if backend == "cpp":
        request.getfixturevalue("extension")
    rskernels.set_backend(backend)
    x, weight, bias = arguments((6,), 5, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = rskernels.linear(x, weight, bias)
        assert out.dtype == torch.bfloat16
        if backend != "cpp":
            assert rskernels.linear(x.double(), weight.double(), bias.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        out.float().sum().backward()  # backward under autocast keeps the dtypes of forward
    assert x.grad.dtype == weight.grad.dtype == bias.grad.dtype == torch.float32
    assert rskernels.linear(x, weight.bfloat16(), bias).dtype == torch.bfloat16
    assert rskernels.linear(x.bfloat16(), weight, bias.bfloat16()).dtype == torch.float32


def test_backward_under_autocast_computes_in_float32(extension):
    """A float32 forward pass whose backward is called inside autocast must not lose precision."""
    rskernels.set_backend("cpp")
    leaves = arguments((64,), 48, 40, torch.float32)
    out = rskernels.linear(*leaves)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    for a, b in zip(inside, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("product", tuning.PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element_is_written(extension, dtype, product):
    """Deterministic mode fills uninitialised memory with NaN."""
    rskernels.set_backend("cpp")
    use_product(product)
    torch.use_deterministic_algorithms(True)
    for activation in ACTIVATIONS:
        leaves = arguments((33,), 17, 19, dtype)
        results = evaluate(lambda *a, act=activation: rskernels.linear(*a, act), leaves, torch.randn(33, 19))
        assert all(torch.isfinite(t).all() for t in results)


@pytest.mark.parametrize("product", tuning.PRODUCTS)
def test_nan_stays_in_its_row(extension, product):
    rskernels.set_backend("cpp")
    use_product(product)
    x, weight, bias = (t.detach() for t in arguments((40,), 64, 48, torch.float32))
    x[7, 3] = float("nan")
    out = rskernels.linear(x, weight, bias, "gelu")
    assert torch.isnan(out[7]).all() and torch.isfinite(out[torch.arange(40) != 7]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_eager_calls_go_straight_to_torch(extension, dtype):
    """There the call of an operator costs more than its product saves; the bits are the operator's."""
    limit = tuning.SMALL_WORK
    assert extension.shape_class(limit // 64 // 64 - 1, 64, 64) != extension.shape_class(
        limit // 64 // 64, 64, 64
    )
    x, weight, bias = arguments((limit // 64 // 64 - 1,), 64, 64, dtype)
    small = rskernels.linear(x, weight, bias, "gelu")
    assert "rskernels" not in type(small.grad_fn).__name__
    with rskernels.backend("cpp"):
        operator = rskernels.linear(x, weight, bias, "gelu")
    assert "rskernels" in type(operator.grad_fn).__name__ and torch.equal(small, operator)
    large = rskernels.linear(torch.cat([x, x]), weight, bias, "gelu")
    assert "rskernels" in type(large.grad_fn).__name__


def test_same_bits_in_every_run(extension, run_python):
    """Fixed threads and fixed products: the same bits from call to call and from process to process."""
    code = """
import hashlib, torch, rskernels
torch.manual_seed(0)
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16):
    x, w, b = (torch.randn(*s).to(dtype).requires_grad_() for s in ((300, 192), (160, 192), (160,)))
    for _ in range(2):
        y = rskernels.linear(x, w, b, "gelu")
        for t in (y, *torch.autograd.grad(y.sum(), (x, w, b))):
            digest.update(t.detach().float().numpy().tobytes())
    first, second = (rskernels.linear(x, w, b) for _ in range(2))
    assert torch.equal(first, second)
print(digest.hexdigest())
"""
    runs = [run_python(code, OMP_NUM_THREADS="2", RSKERNELS_TUNING="off") for _ in range(2)]
    assert [r.returncode for r in runs] == [0, 0], runs[0].stderr + runs[1].stderr
    assert runs[0].stdout == runs[1].stdout != ""


@pytest.mark.parametrize("isa", ("AVX2", "AVX512_CORE"))
def test_older_processors(extension, run_python, isa):
    """oneDNN held to an older instruction set has no bf16 product below AVX-512: PyTorch's own serves."""
    code = """
import torch, rskernels
torch.manual_seed(0)
for dtype, bound in ((torch.float32, 2e-6), (torch.bfloat16, 5e-3)):
    x, w, b = (torch.randn(*s).to(dtype).requires_grad_() for s in ((300, 192), (160, 192), (160,)))
    d = [t.detach().double().requires_grad_() for t in (x, w, b)]
    y, r = rskernels.linear(x, w, b, "gelu"), rskernels.linear(*d, "gelu")
    for a, e in zip((y, *torch.autograd.grad(y.sum(), (x, w, b))), (r, *torch.autograd.grad(r.sum(), d))):
        assert (a.double() - e).norm() <= bound * e.norm(), (dtype, (a.double() - e).norm() / e.norm())
"""
    result = run_python(code, ONEDNN_MAX_CPU_ISA=isa)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("error", "match", "x", "weight", "bias", "activation"),
    [
        (ValueError, r"weight has shape \(3,\)", (2, 3), (3,), None, None),
        (ValueError, r"x has shape \(2, 4\); expected \(\.\.\., 3\)", (2, 4), (5, 3), None, None),
        (ValueError, r"x has shape \(\)", (), (5, 3), None, None),
        (ValueError, r"bias has shape \(3,\); expected \(5,\)", (2, 3), (5, 3), (3,), None),
        (ValueError, "activation is 'silu'", (2, 3), (5, 3), (5,), "silu"),
    ],
)
def test_bad_arguments(error, match, x, weight, bias, activation):
    with pytest.raises(error, match=match):
        rskernels.linear(
            torch.zeros(x), torch.zeros(weight), None if bias is None else torch.zeros(bias), activation
        )


def test_bad_dtype_and_device():
    with pytest.raises(TypeError, match=r"x is torch\.int64"):
        rskernels.linear(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="x is on meta, weight on cpu"):
        rskernels.linear(torch.zeros(2, 3, device="meta"), torch.zeros(5, 3))
