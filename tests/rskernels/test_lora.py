"""lora_linear and lora_qkv: against the formula in float64, frozen weights, memory, bit-equality at B = 0."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rskernels

DTYPES = (torch.float32, torch.bfloat16)
QKV = ("x", "weight", "bias", "a_q", "b_q", "a_v", "b_v")
RESULTS = ("y", "x", "a_q", "b_q", "a_v", "b_v")


def qkv_arguments(dtype, *, rows=(3, 50), inputs=24, dim=16, ranks=(4, 2), bias=True):
    """x, weight, bias, a_q, b_q, a_v, b_v with gradients where lora_qkv gives them."""
    x = torch.randn(*rows, inputs).to(dtype).requires_grad_()
    weight = (torch.randn(3 * dim, inputs) / max(inputs, 1) ** 0.5).to(dtype)
    factors = [
        torch.randn(*shape).to(dtype).requires_grad_()
        for rank in ranks
        for shape in ((rank, inputs), (dim, rank))
    ]
    return [x, weight, torch.randn(3 * dim).to(dtype) if bias else None, *factors]


def formula(x, weight, bias, a_q, b_q, a_v, b_v, *, scale):
    """The merged-weight form, written independently of the package."""
    update = torch.zeros_like(weight)
    dim = weight.shape[0] // 3
    update = update.index_add(0, torch.arange(dim), b_q @ a_q)
    update = update.index_add(0, torch.arange(2 * dim, 3 * dim), b_v @ a_v)
    out = x @ (weight + scale * update).T
    return out if bias is None else out + bias


def gradients(call, args, grad):
    leaves = [a for a in args if a is not None and a.requires_grad]
    out = call(*args, scale=0.75)
    return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def as_dtype(args, dtype):
    return [None if a is None else a.detach().to(dtype).requires_grad_(a.requires_grad) for a in args]


def conditioning(args, exact, grad):
    """Relative errors of the factors' gradients that come from sums whose terms are off by what is allowed,
    independently of each other: more than that where a sum is nearly zero, as one number may be."""
    x, _, _, *factors = (t if t is None else t.detach().double().square() for t in args)
    allowed = {torch.float32: 2e-6, torch.bfloat16: 5e-3}[args[0].dtype]
    x, grad = x.flatten(0, -2), grad.double().square().flatten(0, -2)
    dim = factors[1].shape[0]
    variances = []
    for (a, b), g in zip((factors[:2], factors[2:]), (grad[:, :dim], grad[:, 2 * dim :]), strict=True):
        variances += [(g @ b).T @ x, g.T @ (x @ a.T)]
    sizes = [t.norm().clamp_min(1e-30) for t in exact[2:]]
    errors = [0.75 * allowed * v.sum().sqrt() / size for v, size in zip(variances, sizes, strict=True)]
    return [0.0, 0.0, *(error.item() for error in errors)]


def compare(assert_accurate, args, grad, dtype):
    """lora_qkv in C++ against the formula in float64, output and every gradient, eager as the measure."""
    exact = gradients(formula, as_dtype(args, torch.float64), grad)
    with rskernels.backend("reference"):
        eager = gradients(rskernels.lora_qkv, as_dtype(args, dtype), grad)
    with rskernels.backend("cpp"):
        ours = gradients(rskernels.lora_qkv, args, grad)
    unavoidable = conditioning(args, exact, grad)
    for name, out, peer, reference, error in zip(RESULTS, ours, eager, exact, unavoidable, strict=True):
        assert out.dtype == dtype
        assert_accurate(out, peer, reference, name, error)


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


@settings(
    max_examples=30,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
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
@pytest.mark.parametrize("isa", ("baseline", "avx2", "avx512", "avx512_bf16"))
def test_every_instruction_set(extension, assert_accurate, isa, rows):
    best = extension.cpu_capability()
    try:
        extension.set_cpu_capability(isa)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        for dtype in DTYPES:
            args = qkv_arguments(dtype, rows=(rows,), inputs=77, dim=50, ranks=(5, 16))
            compare(assert_accurate, args, torch.randn(rows, 150).to(dtype), dtype)
    finally:
        extension.set_cpu_capability(best)


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
def test_opcheck(dtype):
    x, weight, bias, a_q, b_q, a_v, b_v = qkv_arguments(dtype, rows=(4, 5))
    args = (x, weight, bias, [a_q, a_v], [b_q, b_v], [0, 32], 0.5, True)
    torch.library.opcheck(torch.ops.rskernels.lora_forward.default, args)
    x, a, b = x.detach(), [a_q.detach(), a_v.detach()], [b_q.detach(), b_v.detach()]
    out, xa = torch.ops.rskernels.lora_forward(x, weight, bias, a, b, [0, 32], 0.5, True)
    for mask in ([True, True, True], [False, True, False], [True, False, False], [False, False, True]):
        args = (torch.randn_like(out), x, weight, a, b, xa, [0, 32], 0.5, mask)
        backward = torch.ops.rskernels.lora_backward.default
        torch.library.opcheck(backward, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("wanted", (("x",), ("a_q", "a_v"), ("b_q", "b_v"), ("b_v",), QKV[:1] + QKV[3:]))
def test_each_gradient_alone_equals_all_together(extension, wanted):
    args = dict(zip(QKV, qkv_arguments(torch.float32), strict=True))
    everything = rskernels.lora_qkv(*args.values(), scale=0.5).square().sum()
    expected = torch.autograd.grad(everything, [args[name] for name in wanted])
    some = {n: t.detach().requires_grad_(n in wanted) for n, t in args.items()}
    rskernels.lora_qkv(*some.values(), scale=0.5).square().sum().backward()
    for name, value in zip(wanted, expected, strict=True):
        assert torch.equal(some[name].grad, value), name
    assert all(t.grad is None for n, t in some.items() if n not in wanted)


def test_backward_keeps_the_low_rank_activation_only(extension):
    """Beside inputs and parameters, what is saved is N x (sum of ranks), not N x D."""
    args = qkv_arguments(torch.float32, rows=(1000,), inputs=32, dim=32)
    known = {t.data_ptr() for t in args}
    extra = []

    def pack(tensor):
        if tensor.data_ptr() not in known:
            extra.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        rskernels.lora_qkv(*args, scale=1.0)
    assert extra == [(1000, 6)]  # x Aᵀ


@pytest.mark.parametrize("frozen", ("weight", "bias"))
@pytest.mark.parametrize("backend", ("reference", "auto"))
def test_trainable_weight_is_an_error(frozen, backend):
    args = dict(zip(QKV, qkv_arguments(torch.float32), strict=True))
    args[frozen].requires_grad_()
    with rskernels.backend(backend), pytest.raises(ValueError, match=f"{frozen} requires grad.*freeze"):
        rskernels.lora_qkv(*args.values(), scale=1.0)


@pytest.mark.parametrize("backend", ("reference", "auto"))
def test_autocast_and_mixed_dtypes(backend):
    rskernels.set_backend(backend)
    args = qkv_arguments(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = rskernels.lora_qkv(*args, scale=1.0)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(args[i].grad.dtype == torch.float32 for i in (0, 3, 4, 5, 6))
    args[1] = args[1].bfloat16()  # frozen weights in bfloat16, trainable factors in float32
    assert rskernels.lora_qkv(*args, scale=1.0).dtype == torch.bfloat16


@pytest.mark.parametrize("dynamic", (False, True))
def test_compiles_with_any_sizes(extension, dynamic):
    compiled = torch.compile(rskernels.lora_qkv, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in ((3, 50), (2, 9)):
        args = qkv_arguments(torch.bfloat16, rows=rows)
        grad = torch.randn(*rows, 48)
        for ours, plain in zip(
            gradients(compiled, args, grad), gradients(rskernels.lora_qkv, args, grad), strict=True
        ):
            assert torch.equal(ours, plain)


def test_exports_with_dynamic_rows(extension):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.a, self.b = (
                torch.nn.Parameter(torch.randn(*shape), requires_grad=False)
                for shape in ((8, 12), (2, 12), (8, 2))
            )

        def forward(self, x):
            return rskernels.lora_linear(x, self.weight, None, self.a, self.b, scale=0.5)

    layer = Layer()
    rows = torch.export.Dim("rows", min=1, max=4096)
    program = torch.export.export(layer, (torch.randn(5, 12),), dynamic_shapes={"x": {0: rows}})
    assert any("lora_forward" in str(node.target) for node in program.graph.nodes)
    x = torch.randn(33, 12)
    assert torch.equal(program.module()(x), layer(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ((3, 50), (1500,)))
def test_every_element_is_written(extension, dtype, rows):
    torch.use_deterministic_algorithms(True)
    args = qkv_arguments(dtype, rows=rows)
    results = gradients(rskernels.lora_qkv, args, torch.randn(*rows, 48))
    assert all(torch.isfinite(t).all() for t in results)


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_composite_operators_match_the_reference(dtype, assert_accurate):
    """What serves the registered operators where no extension is built."""
    args = qkv_arguments(dtype)
    grad = torch.randn(3, 50, 48).to(dtype)
    with rskernels.backend("reference"):
        expected = gradients(rskernels.lora_qkv, args, grad)
    x, weight, bias, a_q, b_q, a_v, b_v = (t.detach() for t in args)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    forward, backward = torch.ops.rskernels.lora_forward.default, torch.ops.rskernels.lora_backward.default
    a, b, columns = [a_q, a_v], [b_q, b_v], [0, 32]
    out, xa = forward.redispatch(keys, x, weight, bias, a, b, columns, 0.75, True)
    dx, da, db = backward.redispatch(keys, grad, x, weight, a, b, xa, columns, 0.75, [True] * 3)
    exact = gradients(formula, as_dtype(args, torch.float64), grad)
    values = (out, dx, da[0], db[0], da[1], db[1])
    for name, value, eager, truth in zip(RESULTS, values, expected, exact, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(value, truth)
        else:
            assert_accurate(value, eager, truth, name)


def test_dropping_xa_is_an_error_where_backward_needs_it(extension):
    x, weight, bias, a, *_ = qkv_arguments(torch.float32, dim=16)
    b_all = torch.randn(48, 4, requires_grad=True)
    forward = torch.ops.rskernels.lora_forward
    assert forward(x, weight, bias, [a], [b_all.detach()], [0], 1.0, False)[1].numel() == 0
    with pytest.raises(ValueError, match="keep_xa"):
        forward(x, weight, bias, [a], [b_all], [0], 1.0, False)


def test_second_derivative_is_an_error_that_names_the_way_out(extension):
    args = qkv_arguments(torch.float32)
    out = rskernels.lora_qkv(*args, scale=1.0).square().sum()
    (dx,) = torch.autograd.grad(out, args[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*backend\('reference'\)"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("name", "shape", "match"),
    [
        ("weight", (47, 24), r"weight has shape \(47, 24\); expected \(3·D, I\)"),
        ("x", (2, 23), r"x has shape \(2, 23\); expected \(\.\.\., 24\)"),
        ("bias", (16,), r"bias has shape \(16,\); expected \(48,\)"),
        ("a_q", (4, 23), r"a_q has shape \(4, 23\); expected \(rank, 24\)"),
        ("b_q", (16, 3), r"b_q has shape \(16, 3\); expected \(16, 4\)"),
        ("b_v", (48, 2), r"b_v has shape \(48, 2\); expected \(16, 2\)"),
    ],
)
def test_bad_shapes(name, shape, match):
    args = dict(zip(QKV, qkv_arguments(torch.float32), strict=True))
    args[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=match):
        rskernels.lora_qkv(*args.values(), scale=1.0)


def test_bad_dtype():
    args = dict(zip(QKV, qkv_arguments(torch.float32), strict=True))
    args["a_v"] = torch.zeros(2, 24, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"a_v is torch\.int32"):
        rskernels.lora_qkv(*args.values(), scale=1.0)


@pytest.mark.parametrize(
    ("error", "scale"), [(ValueError, float("inf")), (ValueError, float("nan")), (TypeError, "1")]
)
def test_bad_scale(error, scale):
    x, weight, bias, a_q, b_q, a_v, b_v = qkv_arguments(torch.float32)
    with pytest.raises(error, match=r"lora_qkv: scale is .*; expected a finite number"):
        rskernels.lora_qkv(x, weight, bias, a_q, b_q, a_v, b_v, scale=scale)
    with pytest.raises(error, match=r"lora_linear: scale is .*; expected a finite number"):
        rskernels.lora_linear(x, weight[:16], None, a_q, b_q, scale=scale)
