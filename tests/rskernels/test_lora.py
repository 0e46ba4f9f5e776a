"""lora_linear and lora_qkv: against the formula in float64, frozen weights, memory, bit-equality at B = 0."""

import pytest
import torch

import rskernels

DTYPES = (torch.float32, torch.bfloat16)
QKV = ("x", "weight", "bias", "a_q", "b_q", "a_v", "b_v")


def qkv_arguments(dtype, *, rows=(3, 50), inputs=24, dim=16, ranks=(4, 2), bias=True):
    """x, weight, bias, a_q, b_q, a_v, b_v with gradients where lora_qkv gives them."""
    x = torch.randn(*rows, inputs).to(dtype).requires_grad_()
    weight = (torch.randn(3 * dim, inputs) / inputs**0.5).to(dtype)
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


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", (((3, 50), 24, 16, (4, 2)), ((2100,), 64, 48, (4, 4)), ((0,), 5, 3, (1, 1)))
)
def test_qkv_matches_float64_formula(extension, assert_accurate, shape, dtype, bias):
    rows, inputs, dim, ranks = shape
    args = qkv_arguments(dtype, rows=rows, inputs=inputs, dim=dim, ranks=ranks, bias=bias)
    grad = torch.randn(*rows, 3 * dim).to(dtype)
    exact = gradients(formula, as_dtype(args, torch.float64), grad)
    with rskernels.backend("reference"):
        eager = gradients(rskernels.lora_qkv, as_dtype(args, dtype), grad)
    with rskernels.backend("cpp"):
        ours = gradients(rskernels.lora_qkv, args, grad)
    names = ("y", "x", "a_q", "b_q", "a_v", "b_v")
    for name, out, peer, reference in zip(names, ours, eager, exact, strict=True):
        assert_accurate(out, peer, reference, name)


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
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    args = (x, weight, bias, [a_q, a_v], [b_q, b_v], [0, 32], 0.5, True)
    torch.library.opcheck(torch.ops.rskernels.lora_forward.default, args, **tolerance)
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


def test_compiles_as_one_graph(extension):
    args = qkv_arguments(torch.float32)
    compiled = torch.compile(rskernels.lora_qkv, fullgraph=True, backend="aot_eager")
    grad = torch.randn(3, 50, 48)
    for ours, plain in zip(
        gradients(compiled, args, grad), gradients(rskernels.lora_qkv, args, grad), strict=True
    ):
        torch.testing.assert_close(ours, plain)


def test_every_element_is_written(extension):
    torch.use_deterministic_algorithms(True)
    args = qkv_arguments(torch.float32)
    results = gradients(rskernels.lora_qkv, args, torch.randn(3, 50, 48))
    assert all(torch.isfinite(t).all() for t in results)


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
