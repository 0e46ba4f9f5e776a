"""lora_linear and lora_qkv as operators: frozen weights, memory, wanted gradients, dtypes, errors."""

import pytest
import torch
from lora_cases import DTYPES, QKV, RESULTS, as_dtype, formula, gradients, qkv_arguments

import rskernels


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
