"""dilated_aspp: the C++ kernel against the reference in float64, output and every gradient."""

import sys
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rskernels
import rskernels.ops.dilated_aspp  # the function of the same name hides the module
from rskernels import dispatch

operator = sys.modules["rskernels.ops.dilated_aspp"]
needs_cpp = pytest.mark.skipif(
    "cpp" in dispatch.UNAVAILABLE, reason=f"no C++ backend: {dispatch.UNAVAILABLE.get('cpp')}"
)
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@dataclass(frozen=True)
class Case:
    """A call: one feature map of each of `inputs` channels, or one map that all branches share."""

    batch: int = 2
    inputs: tuple[int, ...] = (16, 24)
    outputs: tuple[int, ...] = (16, 8)
    height: int = 9
    width: int = 11
    dilations: tuple[int, ...] = (1, 4)
    shared: bool = False
    bias: bool = True
    norm: bool = False
    activation: str | None = "gelu"
    projection: int = 0
    magnitude: float = 1.0
    seed: int = 0

    def branches(self) -> int:
        return len(self.outputs)

    def tensors(self) -> dict[str, Tensor]:
        """By name, in float64; scale and shift get no gradient."""
        rng = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=rng, dtype=torch.float64) * std

        inputs = self.inputs[:1] * self.branches() if self.shared else self.inputs
        maps = inputs[:1] if self.shared else inputs
        found = {
            f"x{i}": normal(self.batch, c, self.height, self.width, std=self.magnitude)
            for i, c in enumerate(maps)
        }
        pairs = zip(self.outputs, inputs, strict=True)
        found |= {f"w{i}": normal(o, c, 3, 3, std=(9 * c) ** -0.5) for i, (o, c) in enumerate(pairs)}
        if self.bias:  # one branch goes without
            found |= {f"b{i}": normal(o) for i, o in enumerate(self.outputs) if i != 1}
        channels = sum(self.outputs)
        if self.norm:
            found |= {"scale": 1 + normal(channels, std=0.2), "shift": normal(channels)}
        if self.projection:
            found |= {
                "pw": normal(self.projection, channels, std=channels**-0.5),
                "pb": normal(self.projection),
            }
        return found

    def grad(self) -> Tensor:
        rng = torch.Generator().manual_seed(self.seed + 1)
        channels = self.projection or sum(self.outputs)
        return torch.randn(self.batch, channels, self.height, self.width, generator=rng, dtype=torch.float64)

    def call(self, found: dict[str, Tensor]) -> Tensor:
        n = self.branches()
        return rskernels.dilated_aspp(
            found["x0"] if self.shared else [found[f"x{i}"] for i in range(n)],
            [found[f"w{i}"] for i in range(n)],
            [found.get(f"b{i}") for i in range(n)],
            dilations=self.dilations,
            scale_shift=(found["scale"], found["shift"]) if self.norm else None,
            activation=self.activation,
            projection=(found["pw"], found["pb"]) if self.projection else None,
        )


def leaves(found: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name: t.detach().to(dtype).clone().requires_grad_(name not in ("scale", "shift"))
        for name, t in found.items()
    }


def run(case: Case, found: dict[str, Tensor], grad: Tensor, backend: str = "cpp") -> dict[str, Tensor]:
    """Output and the gradient of every tensor that requires one."""
    wanted = {name: t for name, t in found.items() if t.requires_grad}
    with rskernels.backend(backend):
        out = case.call(found)
    gradients = torch.autograd.grad(out, list(wanted.values()), grad.to(out.dtype))
    return {"out": out.detach()} | dict(zip(wanted, gradients, strict=True))


def compare(case: Case, dtype: torch.dtype, assert_accurate) -> None:
    """C++ in `dtype` against the float64 reference on the same rounded numbers, eager as the measure."""
    found, grad = leaves(case.tensors(), dtype), case.grad().to(dtype)
    truth = run(case, leaves(found, torch.float64), grad.double(), "reference")
    eager = run(case, leaves(found, dtype), grad, "reference")
    for name, value in run(case, found, grad).items():
        assert value.dtype == dtype
        assert_accurate(value, eager[name], truth[name], f"{name} of {case}")


CASES = [
    Case(inputs=(16,), shared=True, dilations=(2, 5), norm=True, activation="relu"),
    Case(projection=20, norm=True),
    Case(inputs=(7, 5), outputs=(3, 17), dilations=(30, 2), projection=9, activation="gelu_tanh"),
    Case(inputs=(33,), outputs=(20,), dilations=(1,), height=1, width=40, batch=1, activation=None),
    Case(height=40, width=1, dilations=(1, 6), activation="relu", projection=3),
    Case(inputs=(300,), outputs=(270,), dilations=(3,), height=17, width=18, batch=1),
    Case(
        inputs=(8,),
        outputs=(8,),
        dilations=(12,),
        height=3,
        width=300,
        batch=1,
        activation=None,
        projection=8,
    ),
    Case(inputs=(1, 1), outputs=(1, 1), height=1, width=1, batch=1, bias=False, activation="relu"),
]


@needs_cpp
@BOTH
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_float64_reference(case: Case, dtype: torch.dtype, assert_accurate) -> None:
    compare(case, dtype, assert_accurate)


@needs_cpp
@settings(max_examples=40, deadline=None, print_blob=True)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_matches_the_float64_reference_on_any_shape(data, dtype: torch.dtype, assert_accurate) -> None:
    n = data.draw(st.integers(1, 3))

    def several(low: int, high: int) -> st.SearchStrategy:
        return st.lists(st.integers(low, high), min_size=n, max_size=n).map(tuple)

    case = data.draw(
        st.builds(
            Case,
            batch=st.integers(1, 3),
            inputs=several(1, 40),
            outputs=several(1, 40),
            height=st.integers(1, 20),
            width=st.integers(1, 20),
            dilations=several(1, 20),
            shared=st.booleans(),
            bias=st.booleans(),
            norm=st.booleans(),
            activation=st.sampled_from(operator.ACTIVATIONS),
            projection=st.integers(0, 20),
            magnitude=st.sampled_from([0.01, 1.0, 100.0]),
            seed=st.integers(0, 2**16),
        )
    )
    compare(case, dtype, assert_accurate)


@needs_cpp
@BOTH
@pytest.mark.parametrize("inputs", [1, 7, 33])
def test_weights_in_either_layout_give_the_same_bits(dtype: torch.dtype, inputs: int) -> None:
    case = Case(inputs=(inputs,), outputs=(19,), dilations=(2,))
    found, grad = leaves(case.tensors(), dtype), case.grad().to(dtype)
    expected = run(case, found, grad)
    weight = found["w0"].detach().contiguous(memory_format=torch.channels_last)
    for name, value in run(case, found | {"w0": weight.requires_grad_()}, grad).items():
        assert torch.equal(value, expected[name]), name


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
@BOTH
def test_every_element_is_written(dtype: torch.dtype) -> None:
    torch.use_deterministic_algorithms(True)  # fills empty tensors with NaN
    for case in CASES:
        for name, value in run(case, leaves(case.tensors(), dtype), case.grad()).items():
            assert value.isfinite().all(), (name, case)


@pytest.mark.usefixtures("any_level")
@needs_cpp
@BOTH
def test_equal_bits_from_run_to_run_and_for_any_threads(dtype: torch.dtype) -> None:
    # PyTorch's products stand behind the projection's gradients: those are left out for two threads.
    for case in (Case(height=20, width=19, norm=True), Case(inputs=(16,), shared=True, height=30, width=30)):
        found = leaves(case.tensors(), dtype)
        torch.set_num_threads(1)
        once, again = run(case, found, case.grad()), run(case, found, case.grad())
        torch.set_num_threads(2)
        two = run(case, found, case.grad())
        for name, value in once.items():
            assert torch.equal(value, again[name]) and torch.equal(value, two[name]), name
    case = Case(height=20, width=19, projection=24)
    found = leaves(case.tensors(), dtype)
    two = run(case, found, case.grad())["out"]
    torch.set_num_threads(1)
    assert torch.equal(run(case, found, case.grad())["out"], two)


@needs_cpp
@BOTH
@pytest.mark.parametrize("level", range(4))
def test_every_instruction_set(level: int, dtype: torch.dtype, extension, assert_accurate) -> None:
    names = ("baseline", "avx2", "avx512", "avx512_bf16")
    before = extension.cpu_capability()
    try:
        try:
            extension.set_cpu_capability(names[level])
        except ValueError as error:
            pytest.skip(str(error))
        for case in (CASES[0], CASES[1], CASES[2]):
            compare(case, dtype, assert_accurate)
    finally:
        extension.set_cpu_capability(before)


@pytest.mark.usefixtures("any_level")
@needs_cpp
@BOTH
def test_nan_spoils_what_it_reaches_only(dtype: torch.dtype) -> None:
    case = Case(inputs=(8,), outputs=(4,), dilations=(3,), batch=1)
    found = {name: t.detach() for name, t in leaves(case.tensors(), dtype).items()}
    clean = case.call(found)
    found["x0"][0, 2, 4, 5] = torch.nan
    out = case.call(found)
    reached = torch.zeros(9, 11, dtype=torch.bool)
    reached[1:8:3, 2:9:3] = True
    assert out[0, :, reached].isnan().all()
    assert torch.equal(out[0, :, ~reached], clean[0, :, ~reached])


@needs_cpp
@BOTH
def test_large_values(dtype: torch.dtype) -> None:
    for activation in operator.ACTIVATIONS:
        case = Case(activation=activation, magnitude=1e4)
        for name, value in run(case, leaves(case.tensors(), dtype), case.grad()).items():
            assert value.isfinite().all(), (activation, name)


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
