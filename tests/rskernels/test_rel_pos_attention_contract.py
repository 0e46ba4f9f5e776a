"""rel_pos_attention as an operator: layouts, wanted gradients, compilation, autocast, dtypes, errors."""

import pytest
import torch
from rel_pos_attention_cases import CASES, NAMES, Case, needs_cpp, relative_error, rounded, run
from torch import Tensor

import rskernels
from rskernels import rel_pos_attention


@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[4], Case(height=3, width=6)], ids=str)
def test_composite_operators_match_the_reference(case: Case) -> None:
    """What serves the registered operators where no extension is built."""
    arguments = rounded(case.arguments(), torch.float64)
    expected = run(case, rounded(arguments, torch.float64), case.grad(), "reference")
    qkv, rel_pos_h, rel_pos_w, pad = arguments
    operators, scale = torch.ops.rskernels, case.dim**-0.5
    tail = (case.heads, case.window, scale)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    with torch.no_grad():
        out, lse = operators.rel_pos_attention_forward.default.redispatch(
            keys, qkv, rel_pos_h, rel_pos_w, pad, *tail
        )
        gradients = operators.rel_pos_attention_backward.default.redispatch(
            keys, case.grad(), qkv, out, lse, rel_pos_h, rel_pos_w, pad, *tail, [True] * 4
        )
    for name, value, truth in zip(NAMES, (out, *gradients), expected, strict=True):
        if truth is not None:
            torch.testing.assert_close(value, truth, msg=lambda m, name=name: f"{name}: {m}")


@needs_cpp
@pytest.mark.parametrize("mask", range(1, 16))
def test_only_wanted_gradients_exist_and_are_right(mask: int) -> None:
    case = Case(window=4, dim=16)
    everything = run(case, rounded(case.arguments(), torch.float32), case.grad(), "cpp")
    arguments = rounded(case.arguments(), torch.float32)
    for bit, argument in enumerate(arguments):
        argument.requires_grad_(bool(mask >> bit & 1))
    some = run(case, arguments, case.grad(), "cpp")
    for bit, (value, expected) in enumerate(zip(some[1:], everything[1:], strict=True)):
        assert (value is not None) == bool(mask >> bit & 1)
        assert value is None or torch.equal(value, expected)


@pytest.mark.usefixtures("any_level")
@needs_cpp
def test_reads_any_strides() -> None:
    case = Case(batch=2, height=6, width=5, dim=16, window=4)
    arguments = rounded(case.arguments(), torch.float32)
    expected = run(case, arguments, case.grad(), "cpp")
    dense = arguments[0].detach()
    layouts = {
        "channels first": dense.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        "grid transposed": dense.transpose(1, 2).contiguous().transpose(1, 2),
        "a slice of more channels": torch.cat([dense, dense], 3)[..., : dense.shape[3]],
    }
    for name, qkv in layouts.items():
        strided = [qkv.requires_grad_(), *rounded(arguments[1:], torch.float32)]
        # An expanded gradient, as sum() gives it, has strides of 0.
        for value, truth in zip(run(case, strided, case.grad(), "cpp"), expected, strict=True):
            assert torch.equal(value, truth), name
    for arguments_ in (arguments, strided):
        for tensor in arguments_:
            tensor.grad = None
    ones = torch.ones(()).expand(2, 6, 5, 32)
    for value, truth in zip(
        run(case, strided, ones, "cpp"), run(case, arguments, ones.contiguous(), "cpp"), strict=True
    ):
        assert torch.equal(value, truth)


@needs_cpp
def test_opcheck() -> None:
    case = Case(window=4, height=5, width=6)
    qkv, rel_pos_h, rel_pos_w, pad = rounded(case.arguments(), torch.float32)
    tail = (case.heads, case.window, 0.25)
    forward = torch.ops.rskernels.rel_pos_attention_forward.default
    torch.library.opcheck(forward, (qkv, rel_pos_h, rel_pos_w, pad, *tail))
    torch.library.opcheck(forward, (qkv.detach().bfloat16(), None, None, None, *tail))
    qkv, rel_pos_h, rel_pos_w, pad = (t.detach() for t in (qkv, rel_pos_h, rel_pos_w, pad))
    out, lse = forward(qkv, rel_pos_h, rel_pos_w, pad, *tail)
    torch.library.opcheck(
        torch.ops.rskernels.rel_pos_attention_backward.default,
        (torch.ones_like(out), qkv, out, lse, rel_pos_h, rel_pos_w, pad, *tail, [True, True, False, True]),
    )


@needs_cpp
def test_second_derivative_is_an_error_not_a_wrong_answer() -> None:
    case = Case()
    qkv, rel_pos_h, rel_pos_w, _ = rounded(case.arguments(), torch.float32)
    with rskernels.backend("cpp"):
        out = rel_pos_attention(qkv, rel_pos_h, rel_pos_w, num_heads=2)
    (grad,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(32, 96)
        self.rel_pos_h = torch.nn.Parameter(torch.randn(7, 16))
        self.rel_pos_w = torch.nn.Parameter(torch.randn(7, 16))

    def forward(self, x: Tensor) -> Tensor:
        return rel_pos_attention(
            self.qkv(x), self.rel_pos_h, self.rel_pos_w, num_heads=2, window_size=4, pad_qkv=self.qkv.bias
        )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic: bool) -> None:
    torch.manual_seed(0)
    block = Block()
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in [(1, 6, 5, 32), (2, 9, 7, 32)]:
        x = torch.randn(shape)
        expected, out = block(x), compiled(x)
        torch.testing.assert_close(out, expected)
        parameters = list(block.parameters())
        gradients = torch.autograd.grad(out.square().sum(), parameters)
        for value, truth in zip(
            gradients, torch.autograd.grad(expected.square().sum(), parameters), strict=True
        ):
            torch.testing.assert_close(value, truth)
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
def test_autocast_computes_in_its_dtype_and_gradients_keep_theirs(backend: str) -> None:
    case = Case(window=4, dim=32)
    arguments = rounded(case.arguments(), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        values = run(case, arguments, case.grad(), backend)
    assert values[0].dtype == torch.bfloat16
    truths = run(case, rounded(arguments, torch.float64), case.grad(), "reference")
    for name, value, truth in zip(NAMES[1:], values[1:], truths[1:], strict=True):
        assert value.dtype == torch.float32, name
        assert relative_error(value, truth) < 2e-2, name  # q, k, v themselves are rounded to bf16


@needs_cpp
def test_tables_may_be_fp32_beside_bf16_activations() -> None:
    """Their gradients are fp32 sums, not bf16 numbers cast back."""
    case = Case(window=4, dim=32)
    qkv, *rest = case.arguments()
    arguments = [*rounded([qkv], torch.bfloat16), *rounded(rest, torch.float32)]
    values = run(case, arguments, case.grad(), "cpp")
    assert values[1].dtype == torch.bfloat16
    for value in values[2:]:
        assert value.dtype == torch.float32
        assert not torch.equal(value, value.bfloat16().float())


@needs_cpp
def test_empty_batch() -> None:
    qkv = torch.randn(0, 4, 4, 96, requires_grad=True)
    table = torch.randn(7, 16, requires_grad=True)
    out = rel_pos_attention(qkv, table, table, num_heads=2)
    out.sum().backward()
    assert out.shape == (0, 4, 4, 32) and qkv.grad.shape == qkv.shape and not table.grad.any()


BAD = {
    "qkv is list": (TypeError, {"qkv": [1.0]}),
    "qkv is torch.int64": (TypeError, {"qkv": torch.ones(1, 4, 4, 96, dtype=torch.int64)}),
    r"qkv has shape \(4, 4, 96\)": (ValueError, {"qkv": torch.ones(4, 4, 96)}),
    r"divisible by 2 heads": (ValueError, {"qkv": torch.ones(1, 4, 4, 99)}),
    "nothing empty but": (ValueError, {"qkv": torch.ones(1, 0, 4, 96)}),
    r"rel_pos_h has shape \(5, 16\); expected \(7, 16\)": (ValueError, {"rel_pos_h": torch.ones(5, 16)}),
    r"rel_pos_w has shape \(7, 8\); expected \(7, 16\)": (ValueError, {"rel_pos_w": torch.ones(7, 8)}),
    "expected both or neither": (ValueError, {"rel_pos_h": None}),
    r"pad_qkv has shape \(32,\); expected \(96,\)": (ValueError, {"pad_qkv": torch.ones(32)}),
    "num_heads is 0": (ValueError, {"num_heads": 0}),
    "num_heads is 2.0; expected an int": (TypeError, {"num_heads": 2.0}),
    "window_size -1": (ValueError, {"window_size": -1}),
    "window_size is 4294967296": (ValueError, {"window_size": 2**32}),
    "window_size is 4097": (ValueError, {"window_size": 4097}),
    "window_size is 3.5; expected an int": (TypeError, {"window_size": 3.5}),
    "scale is nan": (ValueError, {"scale": float("nan")}),
    "scale is 'large'; expected a finite number": (TypeError, {"scale": "large"}),
    "scale is inf": (ValueError, {"scale": float("inf")}),
    "rel_pos_w is on meta": (ValueError, {"rel_pos_w": torch.ones(7, 16, device="meta")}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message: str) -> None:
    error, change = BAD[message]
    good = {
        "qkv": torch.ones(1, 4, 4, 96),
        "rel_pos_h": torch.ones(7, 16),
        "rel_pos_w": torch.ones(7, 16),
        "num_heads": 2,
    }
    assert rel_pos_attention(**good).shape == (1, 4, 4, 32)
    with pytest.raises(error, match=message):
        rel_pos_attention(**{**good, **change})


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16, torch.float64])
def test_a_query_that_is_nan_is_nan_without_tables(any_backend, dtype) -> None:
    qkv = torch.randn(1, 3, 3, 12).to(dtype)
    qkv[0, 1, 1, 0] = torch.nan
    if rskernels.get_backend() == "cpp" and dtype not in (torch.float32, torch.bfloat16):
        pytest.skip("not served")
    out = rskernels.rel_pos_attention(qkv, None, None, num_heads=1)
    assert out[0, 1, 1].isnan().all() and out.isnan().sum() == 4
