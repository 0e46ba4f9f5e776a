"""dilated_aspp as an operator: layouts, wanted gradients, empty batches, compilation, autocast."""

import pytest
import torch
from dilated_aspp_cases import BOTH, CASES, Case, leaves, needs_cpp, operator, run
from torch import Tensor

import rskernels


@pytest.mark.usefixtures("any_level")
@needs_cpp
@BOTH
def test_reads_any_strides(dtype: torch.dtype) -> None:
    case = Case(inputs=(16, 6), projection=8)
    found, grad = leaves(case.tensors(), dtype), case.grad().to(dtype)
    expected = run(case, found, grad)
    assert expected["out"].is_contiguous(memory_format=torch.channels_last)

    def strided(kind: str, t: Tensor) -> Tensor:
        t = t.detach()
        if kind == "channels last" and t.dim() == 4:
            return t.contiguous(memory_format=torch.channels_last)
        if kind == "a slice of more channels" and t.dim() == 4:
            doubled = torch.cat([t, t], 1).contiguous(memory_format=torch.channels_last)
            return doubled[:, : t.shape[1]]
        return t.repeat_interleave(2, -1)[..., ::2]

    for kind in ("channels last", "a slice of more channels", "every other value"):
        views = {name: strided(kind, t).requires_grad_() for name, t in found.items()}
        for name, value in run(case, views, strided(kind, grad)).items():
            assert torch.equal(value, expected[name]), (kind, name)
    ones = torch.ones((), dtype=dtype).expand(expected["out"].shape)
    dense = run(case, found, ones.contiguous())
    for name, value in run(case, found, ones).items():
        assert torch.equal(value, dense[name]), name


@needs_cpp
@pytest.mark.parametrize(
    "case", [Case(projection=6), Case(inputs=(8,), shared=True, activation="relu")], ids=str
)
def test_only_wanted_gradients_exist_and_are_right(case: Case) -> None:
    found = leaves(case.tensors(), torch.float32)
    everything = run(case, found, case.grad())
    subsets = [{name} for name in found] + [set(found) - {name} for name in found]
    for subset in subsets:
        for name, t in found.items():
            t.requires_grad_(name in subset)
        some = run(case, found, case.grad())
        assert set(some) == subset | {"out"}
        for name, value in some.items():
            assert torch.equal(value, everything[name]), (subset, name)


@needs_cpp
@pytest.mark.parametrize("projection", [0, 5])
def test_empty_batch(projection: int) -> None:
    case = Case(batch=0, projection=projection)
    found = leaves(case.tensors(), torch.float32)
    for name, value in run(case, found, case.grad()).items():
        assert value.shape == (found[name].shape if name != "out" else case.grad().shape)
        assert (value == 0).all()


def test_empty_batch_goes_to_the_reference() -> None:
    x, w, bias = torch.zeros(0, 3, 4, 4, requires_grad=True), torch.zeros(2, 3, 3, 3), torch.randn(2)
    results = []
    for backend in ("auto", "reference"):
        with rskernels.backend(backend):
            results.append(rskernels.dilated_aspp([x], [w], [bias], dilations=(1,), activation="relu"))
    assert results[0].shape == (0, 2, 4, 4) and torch.equal(*results)
    with pytest.raises(ValueError, match="expected nothing empty but the batch"):
        rskernels.dilated_aspp([torch.zeros(1, 0, 4, 4)], [torch.zeros(2, 0, 3, 3)], [None], dilations=(1,))


@needs_cpp
@pytest.mark.parametrize("case", [Case(projection=6, norm=True), Case(inputs=(8,), shared=True)], ids=str)
def test_opcheck(case: Case) -> None:
    found = leaves(case.tensors(), torch.float32)
    n = case.branches()
    features = [found["x0"]] if case.shared else [found[f"x{i}"] for i in range(n)]
    weights = [found[f"w{i}"] for i in range(n)]
    bias = torch.randn(sum(case.outputs), requires_grad=True)
    norm = (found.get("scale"), found.get("shift"))
    last = (found.get("pw"), found.get("pb"))
    forward = (features, weights, bias, list(case.dilations), *norm, "gelu", *last, True)
    torch.library.opcheck(torch.ops.rskernels.dilated_aspp_forward.default, forward)
    out, kept = torch.ops.rskernels.dilated_aspp_forward(*forward)
    mask = [True] * (len(features) + n + 1) + [bool(case.projection)] * 2
    backward = (
        torch.randn_like(out),
        features,
        weights,
        kept,
        norm[0],
        last[0],
        list(case.dilations),
        "gelu",
        mask,
    )
    detached = torch.utils._pytree.tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, backward)
    torch.library.opcheck(torch.ops.rskernels.dilated_aspp_backward.default, detached)


@pytest.mark.parametrize("case", [CASES[0], CASES[1], Case(activation=None, projection=4)], ids=str)
def test_composite_operators_match_the_reference(case: Case) -> None:
    """What serves the registered operators where no extension is built."""
    found = leaves(case.tensors(), torch.float64)
    expected = run(case, found, case.grad(), "reference")
    n, operators = case.branches(), torch.ops.rskernels
    features = [found["x0"]] if case.shared else [found[f"x{i}"] for i in range(n)]
    weights = [found[f"w{i}"] for i in range(n)]
    bias = operator._concatenated(weights, [found.get(f"b{i}") for i in range(n)])
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    options = (case.activation or "none",)
    mask = [True] * (len(features) + n + 1) + [bool(case.projection)] * 2
    with torch.no_grad():
        out, kept = operators.dilated_aspp_forward.default.redispatch(
            keys, features, weights, bias, case.dilations, found.get("scale"), found.get("shift"), *options,
            found.get("pw"), found.get("pb"), True,
        )  # fmt: skip
        dx, dw, db, dpw, dpb = operators.dilated_aspp_backward.default.redispatch(
            keys, case.grad(), features, weights, kept, found.get("scale"), found.get("pw"), case.dilations,
            *options, mask,
        )  # fmt: skip
    values = {"out": out, "pw": dpw, "pb": dpb}
    values |= {f"x{i}": d for i, d in enumerate(dx)} | {f"w{i}": d for i, d in enumerate(dw)}
    values |= {f"b{i}": d for i, d in enumerate(db.split(case.outputs))}
    for name, truth in expected.items():
        torch.testing.assert_close(values[name], truth)


@needs_cpp
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_training_step(dynamic: bool) -> None:
    case = Case(projection=6, norm=True)
    found = leaves(case.tensors(), torch.float32)
    expected = run(case, found, case.grad())
    compiled = torch.compile(case.call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    out = compiled(found)
    assert out.stride() == expected["out"].stride()
    wanted = {name: t for name, t in found.items() if t.requires_grad}
    gradients = torch.autograd.grad(out, list(wanted.values()), case.grad().float())
    for name, value in zip(wanted, gradients, strict=True):
        assert torch.equal(value, expected[name]), name


@needs_cpp
def test_export() -> None:
    case = Case(projection=6)
    found = {name: t.detach() for name, t in leaves(case.tensors(), torch.float32).items()}

    class Head(torch.nn.Module):
        def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
            return case.call(found | {"x0": x0, "x1": x1})

    height, width = torch.export.Dim("height", min=2), torch.export.Dim("width", min=2)
    shapes = {"x0": {2: height, 3: width}, "x1": {2: height, 3: width}}
    program = torch.export.export(Head(), (found["x0"], found["x1"]), dynamic_shapes=shapes)
    x0, x1 = torch.randn(2, 16, 5, 6), torch.randn(2, 24, 5, 6)
    assert torch.equal(program.module()(x0, x1), Head()(x0, x1))


@needs_cpp
def test_second_derivative_is_an_error() -> None:
    case = Case()
    found = leaves(case.tensors(), torch.float32)
    out = case.call(found)
    (dx,) = torch.autograd.grad(out.square().sum(), found["x0"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


@needs_cpp
def test_autocast_is_a_cast() -> None:
    case = Case(projection=6)
    found = leaves(case.tensors(), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        value = run(case, found, case.grad())
    expected = run(case, leaves(found, torch.bfloat16), case.grad())
    assert value["out"].dtype == torch.bfloat16
    for name, truth in expected.items():
        assert torch.equal(value[name].to(torch.bfloat16), truth), name
