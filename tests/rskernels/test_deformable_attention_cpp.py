"""deformable_attention: the C++ kernel against the reference in float64, output and every gradient."""

import math

import pytest
import torch
from deformable_attention_cases import NAMES, Case, leaves
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rskernels
from rskernels import deformable_attention, dispatch

needs_cpp = pytest.mark.skipif(
    "cpp" in dispatch.UNAVAILABLE, reason=f"no C++ backend: {dispatch.UNAVAILABLE.get('cpp')}"
)


def run(case: Case, arguments: list[Tensor], grad: Tensor, backend: str) -> list[Tensor | None]:
    """Output and gradients of `arguments` on a backend."""
    value, locations, weights = arguments
    with rskernels.backend(backend):
        out = deformable_attention(value, case.shapes, locations, weights)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(t.grad for t in arguments)]


def compare(case: Case, assert_accurate, *dtypes: torch.dtype) -> None:
    arguments = leaves(case.arguments(), *dtypes)
    grad = case.grad().to(dtypes[0])
    truths = run(case, leaves(arguments, torch.float64), grad, "reference")
    eagers = run(case, leaves(arguments, *dtypes), grad, "reference")
    values = run(case, arguments, grad, "cpp")
    for name, value, eager, truth, like in zip(
        NAMES, values, eagers, truths, (arguments[0], *arguments), strict=True
    ):
        assert value.dtype == like.dtype, name
        assert_accurate(value, eager, truth, f"{name} of {case}")


CASES = [
    Case(),
    Case(batch=1, queries=336, heads=8, dim=32, shapes=((4, 4), (8, 8), (16, 16))),
    Case(batch=1, queries=400, heads=2, dim=64, shapes=((8, 8),)),  # few tasks: queries are cut
    Case(dim=1, points=1),
    Case(dim=7, shapes=((1, 1),), points=1),
    Case(dim=33, shapes=((1, 13), (11, 1))),
    Case(dim=80, heads=1, queries=1),
    Case(batch=1, dim=256, heads=1, points=5),
    Case(batch=1, queries=3, points=300, dim=5),  # more samples than a tile
]
FLOATS = ((torch.float32,), (torch.bfloat16, torch.float32), (torch.bfloat16,))


@needs_cpp
@pytest.mark.parametrize("dtypes", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpp_matches_the_float64_reference(case, dtypes, assert_accurate):
    compare(case, assert_accurate, *dtypes)


@needs_cpp
@settings(max_examples=60)
@given(
    case=st.builds(
        Case,
        batch=st.integers(1, 2),
        queries=st.integers(1, 70),
        heads=st.integers(1, 4),
        dim=st.integers(1, 256) | st.sampled_from([16, 32, 64]),
        shapes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=4).map(tuple),
        points=st.integers(1, 6),
        magnitude=st.sampled_from([1e-3, 1.0, 1e3]),
        seed=st.integers(0, 2**16),
    ),
    dtypes=st.sampled_from(FLOATS),
)
def test_cpp_matches_the_float64_reference_on_any_shape(case, dtypes, assert_accurate):
    compare(case, assert_accurate, *dtypes)


@needs_cpp
def test_every_instruction_set(every_level, assert_accurate):
    for case in (CASES[0], CASES[2], CASES[5], CASES[7]):
        for dtypes in FLOATS:
            compare(case, assert_accurate, *dtypes)
    check_unusual_locations(torch.float32, assert_accurate)


def check_unusual_locations(dtype: torch.dtype, assert_accurate) -> None:
    """Far outside and on borders as in the reference; NaN and infinity spoil their query's head alone."""
    case = Case(batch=1, queries=40, heads=2, dim=16, points=2)
    value, locations, weights = (t.detach() for t in leaves(case.arguments(), dtype, torch.float32))
    borders = (0.0, 1.0, -0.0, 0.5, -1e-7, 1.0 + 1e-7, -1e9, 1e9, 2.0**31, -(2.0**33), 1e30, -1e30, 1e-40)
    for query, at in enumerate(borders):
        locations[0, query, 0, :, 0, query % 2] = at
        locations[0, query, 1, :, :, :] = at
    with rskernels.backend("cpp"):
        clean = deformable_attention(value, case.shapes, locations, weights)
    expected = deformable_attention(value.double(), case.shapes, locations.double(), weights.double())
    with rskernels.backend("reference"):
        eager = deformable_attention(value, case.shapes, locations, weights)
    assert_accurate(clean, eager, expected, "unusual locations")

    nowhere = (math.nan, math.inf, -math.inf, 3e38)
    for query, at in enumerate(nowhere, len(borders)):
        locations[0, query, 1, 1, 0, query % 2] = at
    arguments = [t.requires_grad_() for t in (value, locations, weights)]
    spoiled, *gradients = run(case, arguments, torch.ones(1, 40, 32), "cpp")
    spoiled, clean = spoiled.view(40, 2, 16), clean.view(40, 2, 16)
    for query, at in enumerate(nowhere, len(borders)):
        row = spoiled[query, 1]
        assert row.isnan().all() or at == 3e38, (at, row)
        spoiled[query, 1] = clean[query, 1]
        for gradient in gradients[1:]:
            gradient[0, query, 1, 1, 0] = 0
    assert torch.equal(spoiled, clean)
    for gradient in gradients:
        assert gradient.isfinite().all()


@needs_cpp
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_unusual_locations(dtype, assert_accurate):
    check_unusual_locations(dtype, assert_accurate)


@pytest.mark.usefixtures("any_level")
@needs_cpp
def test_nan_pixel_spoils_only_who_samples_it():
    case = Case(batch=1, heads=1, queries=600, shapes=((5, 6),), points=1)
    value, locations, weights = (t.detach() for t in leaves(case.arguments(), torch.float32))
    clean = deformable_attention(value, case.shapes, locations, weights)
    value[0, 0] = torch.nan  # the upper left pixel: clamped indices would drag it in from outside
    spoiled = deformable_attention(value, case.shapes, locations, weights)
    position = locations[0, :, 0, 0, 0] * torch.tensor([6.0, 5.0]) - 0.5
    touches = ((position > -1) & (position < 1)).all(-1)
    assert 0 < touches.sum() < 600
    assert spoiled[0, touches].isnan().all()
    assert torch.equal(spoiled[0, ~touches], clean[0, ~touches])


@needs_cpp
def test_huge_values_and_weights_stay_finite():
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(magnitude=1e15)
        value, locations, weights = leaves(case.arguments(), dtype, torch.float32)
        arguments = [value, locations, (weights.detach() * 1e15).requires_grad_()]
        assert all(t.isfinite().all() for t in run(case, arguments, case.grad(), "cpp"))


@needs_cpp
@pytest.mark.parametrize("mask", range(1, 8))
def test_only_wanted_gradients_exist_and_are_right(mask):
    case = CASES[2]
    everything = run(case, leaves(case.arguments(), torch.float32), case.grad(), "cpp")
    arguments = leaves(case.arguments(), torch.float32)
    for bit, argument in enumerate(arguments):
        argument.requires_grad_(bool(mask >> bit & 1))
    some = run(case, arguments, case.grad(), "cpp")
    for bit, (value, expected) in enumerate(zip(some[1:], everything[1:], strict=True)):
        assert (value is not None) == bool(mask >> bit & 1)
        assert value is None or torch.equal(value, expected)


@pytest.mark.usefixtures("any_level")
@needs_cpp
def test_reads_any_strides():
    case = Case(dim=20)
    arguments = leaves(case.arguments(), torch.float32)
    expected = run(case, arguments, case.grad(), "cpp")
    dense, locations, weights = (t.detach() for t in arguments)
    layouts = {
        "heads outside": dense.transpose(1, 2).contiguous().transpose(1, 2),
        "channels strided": dense.transpose(1, 3).contiguous().transpose(1, 3),
        "a slice of more channels": torch.cat([dense.flatten(2)] * 2, 2)[..., :60].unflatten(2, (3, 20)),
    }
    for name, value in layouts.items():
        assert not value.is_contiguous()
        strided = [
            value.requires_grad_(),
            locations.flip(0).transpose(1, 2).contiguous().transpose(1, 2).flip(0).requires_grad_(),
            weights.transpose(1, 4).contiguous().transpose(1, 4).requires_grad_(),
        ]
        for t in strided:
            t.grad = None
        for ours, truth in zip(run(case, strided, case.grad(), "cpp"), expected, strict=True):
            assert torch.equal(ours, truth), name
    for t in arguments:
        t.grad = None
    ones = torch.ones(()).expand(2, 29, 60)  # as sum() gives it: strides of 0
    dense_ones = run(case, arguments, ones.contiguous(), "cpp")
    for ours, truth in zip(run(case, leaves(arguments, torch.float32), ones, "cpp"), dense_ones, strict=True):
        assert torch.equal(ours, truth)


@pytest.mark.usefixtures("any_level")
@needs_cpp
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[5], CASES[8]], ids=str)
def test_same_bits_on_every_run_and_number_of_threads(case, dtype):
    """Outputs and buffers are poisoned first, so this also sees every element written."""
    torch.use_deterministic_algorithms(True)
    results = []
    for count in (1, 2, 2, 3):
        torch.set_num_threads(count)
        results.append(run(case, leaves(case.arguments(), dtype, torch.float32), case.grad(), "cpp"))
    for other in results[1:]:
        for name, value, expected in zip(NAMES, other, results[0], strict=True):
            assert torch.equal(value, expected) and value.isfinite().all(), name


@needs_cpp
@pytest.mark.parametrize("sizes", ((0, 4, 2, 3), (2, 0, 2, 3), (2, 4, 0, 3), (2, 4, 2, 0)), ids=str)
def test_empty(sizes):
    batch, queries, heads, dim = sizes
    case = Case(batch, queries, heads, dim)
    out, *gradients = run(case, leaves(case.arguments(), torch.float32), case.grad(), "cpp")
    assert out.shape == (batch, queries, heads * dim)
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=str)
def test_composite_operators_match_the_reference(case):
    """What serves the registered operators where no extension is built."""
    arguments = leaves(case.arguments(), torch.float64)
    expected = run(case, leaves(arguments, torch.float64), case.grad(), "reference")
    value, locations, weights = arguments
    sides = [side for shape in case.shapes for side in shape]
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    operators = torch.ops.rskernels
    with torch.no_grad():
        out = operators.deformable_attention_forward.default.redispatch(
            keys, value, sides, locations, weights
        )
        gradients = operators.deformable_attention_backward.default.redispatch(
            keys, case.grad(), value, sides, locations, weights, [True] * 3
        )
    for name, ours, truth in zip(NAMES, (out, *gradients), expected, strict=True):
        torch.testing.assert_close(ours, truth, msg=lambda m, name=name: f"{name}: {m}")


@needs_cpp
def test_opcheck():
    case = Case()
    value, locations, weights = leaves(case.arguments(), torch.float32)
    sides = [side for shape in case.shapes for side in shape]
    forward = torch.ops.rskernels.deformable_attention_forward.default
    torch.library.opcheck(forward, (value, sides, locations, weights))
    value, locations, weights = (t.detach() for t in (value, locations, weights))
    torch.library.opcheck(forward, (value.bfloat16(), sides, locations, weights))
    grad = case.grad().float()
    torch.library.opcheck(
        torch.ops.rskernels.deformable_attention_backward.default,
        (grad, value, sides, locations, weights, [True, False, True]),
    )


@needs_cpp
def test_operator_called_directly_checks_its_memory():
    value, locations, weights = (t.detach() for t in leaves(Case().arguments(), torch.float32))
    forward = torch.ops.rskernels.deformable_attention_forward
    for sides in ([9, 7, 4, 5, 1, 2], [-9, -7, 4, 5, 1, 1], [9, 7, 4, 5]):
        with pytest.raises(ValueError, match="deformable_attention"):
            forward(value, sides, locations, weights)
    with pytest.raises(ValueError, match="sampling_locations has shape"):
        forward(value, [9, 7, 4, 5, 1, 1], locations[..., :1], weights)


@needs_cpp
def test_second_derivative_is_an_error_not_a_wrong_answer():
    value, locations, weights = leaves(Case().arguments(), torch.float32)
    out = deformable_attention(value, Case().shapes, locations, weights)
    (grad,) = torch.autograd.grad(out.square().sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


class Sampler(torch.nn.Module):
    def forward(self, value: Tensor, shapes: list, locations: Tensor, weights: Tensor) -> Tensor:
        return deformable_attention(value.relu(), shapes, locations, weights) * 2


@pytest.mark.parametrize("dynamic", (False, True))
def test_compiles_whole(dynamic):
    compiled = torch.compile(Sampler(), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for case in (Case(), Case(queries=31, shapes=((5, 6), (3, 4), (2, 2)))):
        arguments = leaves(case.arguments(), torch.float32)
        value, locations, weights = arguments
        grad = case.grad().float()
        out = compiled(value, case.shapes, locations, weights)
        expected = Sampler()(value, case.shapes, locations, weights)
        torch.testing.assert_close(out, expected)
        for ours, truth in zip(
            torch.autograd.grad(out, arguments, grad),
            torch.autograd.grad(expected, arguments, grad),
            strict=True,
        ):
            torch.testing.assert_close(ours, truth)
    torch.compiler.reset()


def test_exports_with_dynamic_queries():
    case = Case()
    value, locations, weights = (t.detach() for t in leaves(case.arguments(), torch.float32))
    queries = {1: torch.export.Dim("queries", min=2, max=100)}
    program = torch.export.export(
        Sampler(),
        (value, list(case.shapes), locations, weights),
        dynamic_shapes=(None, [(None, None)] * 3, queries, queries),
    )
    fewer = (value, list(case.shapes), locations[:, :11], weights[:, :11])
    torch.testing.assert_close(program.module()(*fewer), Sampler()(*fewer))


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
def test_autocast_leaves_the_call_alone(backend):
    case = Case()
    plain = run(case, leaves(case.arguments(), torch.bfloat16, torch.float32), case.grad(), backend)
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(case, leaves(case.arguments(), torch.bfloat16, torch.float32), case.grad(), backend)
    for ours, truth in zip(cast, plain, strict=True):
        assert ours.dtype == truth.dtype and torch.equal(ours, truth)


@needs_cpp
def test_who_serves():
    value, locations, weights = (t.detach() for t in leaves(Case().arguments(), torch.float32))
    shapes = Case().shapes
    with rskernels.backend("cpp"):
        deformable_attention(value.bfloat16(), shapes, locations.half(), weights.bfloat16())
        for bad in (
            (value.double(), locations, weights),
            (value.half(), locations, weights),
            (value, locations.double(), weights),
            (value, locations, weights.double()),
        ):
            with pytest.raises(ValueError, match="cannot serve deformable_attention"):
                deformable_attention(bad[0], shapes, *bad[1:])
    wide = deformable_attention(value, shapes, locations.double(), weights)
    torch.testing.assert_close(wide, deformable_attention(value, shapes, locations, weights))
