"""cross_attention as an operator: layouts, wanted gradients, compilation, autocast."""

import pytest
import torch
from cross_attention_cases import CASES, NAMES, Case, as_double, needs_cpp, relative_error_of, run
from torch import Tensor

import rskernels


@pytest.mark.parametrize("case", [CASES[2], CASES[5], Case(queries=9, density=0.3, drop=True)], ids=str)
def test_composite_operators_match_the_reference(case: Case) -> None:
    """What serves the registered operators where no extension is built."""
    leaves, mask, grad = case.inputs(torch.float64)
    expected = run(case, leaves, mask, grad, "reference")
    operators, tail = torch.ops.rskernels, (mask, case.dim**-0.5, case.drop)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    with torch.no_grad():
        out, lse = operators.cross_attention_forward.default.redispatch(keys, *leaves, *tail)
        gradients = operators.cross_attention_backward.default.redispatch(
            keys, grad, *leaves, out, lse, *tail, [True] * 3
        )
    for name, value, truth in zip(NAMES, (out, *gradients), expected, strict=True):
        torch.testing.assert_close(value, truth, msg=lambda m, name=name: f"{name}: {m}")


@needs_cpp
@pytest.mark.parametrize("wanted", range(1, 8))
@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[5]], ids=str)
def test_only_wanted_gradients_exist_and_are_right(case: Case, wanted: int) -> None:
    leaves, mask, grad = case.inputs(torch.float32)
    everything = run(case, leaves, mask, grad, "cpp")
    for bit, leaf in enumerate(leaves):
        leaf.grad = None
        leaf.requires_grad_(bool(wanted >> bit & 1))
    some = run(case, leaves, mask, grad, "cpp")
    for bit, (value, expected) in enumerate(zip(some[1:], everything[1:], strict=True)):
        assert (value is not None) == bool(wanted >> bit & 1)
        assert value is None or torch.equal(value, expected)


@needs_cpp
@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=str)
def test_output_and_gradients_are_stored_by_token(case: Case) -> None:
    """What the models do next, `.transpose(1, 2).flatten(2)`, must be a view."""
    leaves, mask, grad = case.inputs(torch.float32)
    for name, value in zip(NAMES, run(case, leaves, mask, grad, "cpp"), strict=True):
        assert value.transpose(1, 2).is_contiguous(), name


@needs_cpp
def test_reads_expanded_gradients_and_masks_of_any_strides() -> None:
    case = CASES[3]
    leaves, mask, _ = case.inputs(torch.float32)
    ones = torch.ones(()).expand(2, 3, 100, 32)
    expected = run(case, leaves, mask, ones.contiguous(), "cpp")
    strided = mask.transpose(1, 2).contiguous().transpose(1, 2)
    rows_of_more = torch.cat([mask, mask], 2)[:, :, : case.keys]
    for each in (mask, strided, rows_of_more):
        for value, truth in zip(run(case, leaves, each, ones, "cpp"), expected, strict=True):
            assert torch.equal(value, truth)


@needs_cpp
def test_opcheck() -> None:
    forward = torch.ops.rskernels.cross_attention_forward.default
    backward = torch.ops.rskernels.cross_attention_backward.default
    for case in (Case(shared=(True, False)), Case(density=0.3, drop=True)):
        leaves, mask, grad = case.inputs(torch.float32)
        tail = (mask, 0.25, case.drop)
        torch.library.opcheck(forward, (*leaves, *tail))
        leaves = [leaf.detach() for leaf in leaves]
        torch.library.opcheck(forward, (*(leaf.bfloat16() for leaf in leaves), *tail))
        out, lse = forward(*leaves, *tail)
        torch.library.opcheck(backward, (grad, *leaves, out, lse, *tail, [True, False, True]))


@needs_cpp
def test_second_derivative_is_an_error_not_a_wrong_answer() -> None:
    leaves, _, _ = Case().inputs(torch.float32)
    with rskernels.backend("cpp"):
        out = rskernels.cross_attention(*leaves)
    (grad,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


class Decoder(torch.nn.Module):
    """Attention as the models use it: projections, heads as views, heads joined again."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = torch.nn.Linear(32, 32), torch.nn.Linear(32, 64)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (2, 16)).transpose(1, 2) for t in (self.q(x), *self.kv(memory).chunk(2, -1))
        )
        return rskernels.cross_attention(q, k, v, mask=mask).transpose(1, 2).flatten(2)


def decoder_inputs(batch: int, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(batch, queries, 32),
        torch.randn(batch, keys, 32),
        torch.rand(batch, queries, keys) > 0.5,
    )


@pytest.mark.parametrize(
    ("dynamic", "backend"),
    [(True, "reference"), *(pytest.param(d, "cpp", marks=needs_cpp) for d in (False, True))],
)
def test_compiles_whole(dynamic: bool, backend: str) -> None:
    decoder = Decoder()
    compiled = torch.compile(decoder, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    parameters = list(decoder.parameters())
    with rskernels.backend(backend):
        for sizes in [(2, 5, 70), (3, 20, 33)]:
            inputs = decoder_inputs(*sizes)
            expected, out = decoder(*inputs), compiled(*inputs)
            torch.testing.assert_close(out, expected)
            truths = torch.autograd.grad(expected.square().sum(), parameters)
            for value, truth in zip(torch.autograd.grad(out.square().sum(), parameters), truths, strict=True):
                torch.testing.assert_close(value, truth)
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
def test_exports_with_dynamic_sizes(backend: str) -> None:
    decoder = Decoder().eval()
    batch, queries, keys = (torch.export.Dim(name, min=2, max=512) for name in ("batch", "queries", "keys"))
    shapes = ({0: batch, 1: queries}, {0: batch, 1: keys}, {0: batch, 1: queries, 2: keys})
    with rskernels.backend(backend):
        exported = torch.export.export(decoder, decoder_inputs(2, 8, 40), dynamic_shapes=shapes)
        inputs = decoder_inputs(3, 5, 300)
        torch.testing.assert_close(exported.module()(*inputs), decoder(*inputs))


@needs_cpp
def test_autocast_of_the_kernel_and_gradients_keep_their_dtypes() -> None:
    case = Case(queries=70, keys=90, dim=32)
    leaves, mask, grad = case.inputs(torch.float32)
    leaves[1] = leaves[1].detach().bfloat16().requires_grad_()
    truths = run(case, as_double(leaves), mask, grad, "reference")
    with torch.autocast("cpu", torch.bfloat16):
        values = run(case, leaves, mask, grad, "cpp")
    assert [value.dtype for value in values] == [torch.bfloat16, torch.float32, torch.bfloat16, torch.float32]
    for value, truth in zip(values, truths, strict=True):
        assert relative_error_of(value, truth, 0.0) < 2e-2  # q, k, v themselves are rounded to bf16


@needs_cpp
@pytest.mark.parametrize("shape", [(0, 2, 5, 16), (2, 0, 5, 16), (2, 2, 0, 16)])
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    q = torch.randn(shape, requires_grad=True)
    k = torch.randn(1, shape[1], 7, 16, requires_grad=True)
    with rskernels.backend("cpp"):
        out = rskernels.cross_attention(q, k, k)
    out.sum().backward()
    assert out.shape == shape and q.grad.shape == shape and not k.grad.any()
