"""The Triton kernels of dilated_aspp against autograd through the reference in float64."""

import dataclasses

import pytest
import torch
from dilated_aspp_cases import Case, leaves, operator
from dilated_aspp_cases import run as run_public
from hypothesis import given, settings
from hypothesis import strategies as st

import rskernels
from rskernels.triton import dilated_aspp, dilated_aspp_backward, launch
from rskernels.triton.dilated_aspp_parts import patch_shape
from rskernels.triton.launch import config

TINY = Case(batch=1, inputs=(5, 6), outputs=(7, 3), height=5, width=6, dilations=(1, 3))
CASES = [
    TINY,
    dataclasses.replace(TINY, batch=2, norm=True, projection=6, activation="gelu_tanh"),
    Case(
        inputs=(8,),
        outputs=(4, 5),
        height=4,
        width=7,
        dilations=(2, 1),
        shared=True,
        activation="relu",
        norm=True,
    ),
    Case(
        inputs=(3,),
        outputs=(2,),
        height=1,
        width=150,
        dilations=(30,),
        batch=1,
        activation=None,
        projection=3,
    ),
    Case(inputs=(40,), outputs=(33,), height=7, width=1, dilations=(2,), bias=False, activation="relu"),
    # More branches than one launch takes.
    Case(inputs=(2,), outputs=(1,) * 5, height=2, width=3, dilations=(1, 2, 1, 2, 1), batch=1, shared=True),
]
EVERY = pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))


def arguments(case, found):
    """What the private operator takes, from tensors by name."""
    maps = [found["x0"]] if case.shared else [found[f"x{i}"] for i in range(case.branches())]
    weights = [found[f"w{i}"] for i in range(case.branches())]
    bias = operator._concatenated(weights, [found.get(f"b{i}") for i in range(case.branches())])
    return maps, weights, bias


def run(case, found, grad, keep=True, mask=None):
    """Output and gradients by name, from the launchers; a gradient that mask leaves out is empty."""
    maps, weights, bias = arguments(case, found)
    scale, pw, activation = found.get("scale"), found.get("pw"), case.activation or "none"
    shift, pb = found.get("shift"), found.get("pb")
    forward = (maps, weights, bias, list(case.dilations), scale, shift, activation, pw, pb, keep)
    out, kept = dilated_aspp.forward(*forward)
    same_form((out, kept), operator._forward_fake(*forward))
    mask = mask or [True] * (len(maps) + len(weights)) + [bias is not None] + [pw is not None] * 2
    saved = kept if keep else out.permute(0, 2, 3, 1)
    backward = (grad, maps, weights, saved, scale, pw, list(case.dilations), activation, mask)
    d_maps, d_weights, d_bias, d_pw, d_pb = results = dilated_aspp_backward.backward(*backward)
    same_form(flat(results), flat(operator._backward_fake(*backward)))
    named = {"out": out, "kept": kept, "pw": d_pw, "pb": d_pb}
    named |= {f"x{i}": d for i, d in enumerate(d_maps)} | {f"w{i}": d for i, d in enumerate(d_weights)}
    parts = d_bias.split([len(weight) for weight in weights]) if d_bias.numel() else [d_bias] * len(weights)
    return named | {f"b{i}": d for i, d in enumerate(parts)}


def flat(results):
    return [*results[0], *results[1], *results[2:]]


def same_form(found, expected):
    for value, fake in zip(found, expected, strict=True):
        assert (value.shape, value.stride(), value.dtype) == (fake.shape, fake.stride(), fake.dtype)


def on(device, found):
    return {name: t.detach().to(device) for name, t in found.items()}


def check(case, device, dtype, assert_accurate, keep=True, change=lambda found: found):
    found, grad = on(device, leaves(case.tensors(), dtype)), case.grad().to(device, dtype)
    truth = run_public(case, leaves(found, torch.float64), grad.double(), "reference")
    eager = run_public(case, leaves(found, dtype), grad, "reference")
    results = run(case, change(found), grad, keep)
    for name, exact in truth.items():
        assert results[name].dtype == dtype
        assert_accurate(results[name], eager[name], exact, f"{name} of {case}")
    if keep:
        linear = dataclasses.replace(case, activation=None, projection=0)
        entered = linear.call(leaves(found, torch.float64)).detach().permute(0, 2, 3, 1)
        assert_accurate(results["kept"], entered.to(dtype), entered, f"kept of {case}")


@EVERY
def test_matches_float64(device, dtype, assert_accurate, case):
    check(case, device, dtype, assert_accurate)


def test_relu_from_its_result(device, dtype, assert_accurate):
    """What autograd passes where nothing is kept."""
    check(dataclasses.replace(TINY, activation="relu"), device, dtype, assert_accurate, keep=False)


@settings(max_examples=3)
@given(
    batch=st.integers(1, 2),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 40),
    height=st.integers(1, 11),
    width=st.integers(1, 11),
    dilation=st.integers(1, 12),
    norm=st.booleans(),
    activation=st.sampled_from(operator.ACTIVATIONS),
    seed=st.integers(0, 2**16),
)
def test_any_shape(
    device, assert_accurate, batch, inputs, outputs, height, width, dilation, norm, activation, seed
):
    case = Case(
        batch, (inputs,), (outputs,), height, width, (dilation,), norm=norm, activation=activation, seed=seed
    )  # fmt: skip
    check(case, device, torch.float32, assert_accurate)


def spaced(x):
    """Every other channel group of a wider channels-last map: pixels lie 2 C apart."""
    wide = torch.cat([x, x], 1).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return wide[:, : x.shape[1]]


@pytest.mark.parametrize(
    "form",
    [lambda x: x.contiguous(memory_format=torch.channels_last), spaced, lambda x: x.flip(2).flip(2).mT.mT],
)
def test_any_memory(device, dtype, form):
    """Maps, weights and gradients as they come; what is read in place gives the same bits."""
    case = dataclasses.replace(TINY, batch=2)
    found, grad = on(device, leaves(case.tensors(), dtype)), case.grad().to(device, dtype)
    changed = {name: form(t) if name[0] in "xw" else t for name, t in found.items()}
    expected, results = run(case, found, grad), run(case, changed, form(grad))
    assert all(torch.equal(results[name], expected[name]) for name in expected)
    ones = grad.new_ones(()).expand(grad.shape)
    expected, results = run(case, found, ones.contiguous()), run(case, found, ones)
    assert all(torch.equal(results[name], expected[name]) for name in expected)


@pytest.mark.parametrize("slab", [1, 2 * 6 * 10, 2 * 5 * 6 * 10])  # bytes: a row, two rows of 6, two maps
def test_slabs_change_nothing(device, monkeypatch, slab):
    case = dataclasses.replace(TINY, batch=3, projection=4)
    found, grad = on(device, leaves(case.tensors(), torch.float32)), case.grad().to(device).float()
    expected = run(case, found, grad)
    monkeypatch.setattr(dilated_aspp, "SLAB_BYTES", 4 * slab)
    results = run(case, found, grad)
    torch.testing.assert_close(results["out"], expected["out"], rtol=1e-6, atol=1e-6)
    assert torch.equal(results["kept"], expected["kept"])


def test_slices_of_pixels_add_up(device, dtype, assert_accurate, monkeypatch):
    monkeypatch.setattr(dilated_aspp_backward, "WEIGHT_PIXELS", 8)
    monkeypatch.setattr(dilated_aspp_backward, "BIAS_PIXELS", 8)
    check(TINY, device, dtype, assert_accurate)


def test_unwanted_gradients_are_empty_and_change_nothing(device):
    case = dataclasses.replace(TINY, projection=4)
    found, grad = on(device, leaves(case.tensors(), torch.float32)), case.grad().to(device).float()
    names = ("x0", "x1", "w0", "w1", "b", "pw", "pb")
    expected = run(case, found, grad)
    for wanted in (("x1",), ("w0",), ("b",), ("pw",), ("pb",), ()):
        results = run(case, found, grad, mask=[name in wanted for name in names])
        for name, value in results.items():
            if name in ("out", "kept") or name in wanted or name[:1] in wanted:
                assert torch.equal(value, expected[name]), (name, wanted)
            else:
                assert value.numel() == 0, (name, wanted)


def test_empty_batch(device, dtype):
    case = dataclasses.replace(TINY, batch=0, projection=4)
    found, grad = on(device, leaves(case.tensors(), dtype)), case.grad().to(device, dtype)
    results = run(case, found, grad)
    assert results["out"].shape == (0, 4, 5, 6)
    assert all(not value.any() for value in results.values())


def test_taps_outside_are_not_read(device, dtype):
    """At a dilation beyond the map the middle tap alone is: NaN in the others is not seen."""
    case = dataclasses.replace(TINY, dilations=(6, 7))
    found = on(device, leaves(case.tensors(), dtype))
    centre = {name: torch.full_like(t, torch.nan) if name[0] == "w" else t for name, t in found.items()}
    for name in ("w0", "w1"):
        centre[name][:, :, 1, 1] = found[name][:, :, 1, 1]
    maps, weights, bias = arguments(case, centre)
    out, _ = dilated_aspp.forward(maps, weights, bias, [6, 7], None, None, "none", None, None, False)
    products = [
        torch.einsum("bchw,oc->bohw", x.double(), w[:, :, 1, 1].double())
        for x, w in zip(maps, weights, strict=True)
    ]
    expected = torch.cat(products, 1) + bias.double()[:, None, None]
    torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=2e-3)


def test_nan_spoils_what_it_reaches_only(device, dtype):
    case = Case(inputs=(4,), outputs=(2,), dilations=(3,), batch=1, activation="relu")
    found = on(device, leaves(case.tensors(), dtype))
    grad = case.grad().to(device, dtype)
    clean = run(case, found, grad)["out"]
    found["x0"][0, 2, 4, 5] = torch.nan
    out = run(case, found, grad)["out"]
    reached = torch.zeros(9, 11, dtype=torch.bool, device=device)
    reached[1:8:3, 2:9:3] = True
    assert out[0, :, reached].isnan().all()
    assert torch.equal(out[0, :, ~reached], clean[0, :, ~reached])


@pytest.mark.parametrize("activation", operator.ACTIVATIONS)
def test_large_values(device, activation):
    case = dataclasses.replace(TINY, activation=activation, magnitude=1e4)
    found, grad = on(device, leaves(case.tensors(), torch.float32)), case.grad().to(device).float()
    assert all(value.isfinite().all() for value in run(case, found, grad).values())


def test_same_bits_on_every_run(device, dtype):
    case = dataclasses.replace(TINY, norm=True)
    found, grad = on(device, leaves(case.tensors(), dtype)), case.grad().to(device, dtype)
    first, second = run(case, found, grad), run(case, found, grad)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_patches_have_the_fewest_taps():
    """Where a dilation leaves out taps, patches follow the map's edges; a row of pixels is one patch."""
    assert patch_shape(1, 300, (12,), 128) == (1, 128)
    assert patch_shape(300, 1, (12,), 64) == (64, 1)
    height, width = patch_shape(32, 32, (1, 6, 12, 18), 128)
    assert height * width == 128 and width < 32


@pytest.mark.parametrize("outputs", ["o16", "o128"])
@pytest.mark.parametrize(
    "module, kernel",
    [
        ("dilated_aspp", "convolve"),
        ("dilated_aspp", "convolve_sum"),
        ("dilated_aspp_backward", "weight_gradient"),
        ("dilated_aspp_backward", "pass_activation"),
        ("dilated_aspp_backward", "finish_weight"),
    ],
)
def test_candidates_fit_their_kernel(module, kernel, outputs):
    found = (dilated_aspp if module == "dilated_aspp" else dilated_aspp_backward).candidates(
        kernel, f"half/{outputs}"
    )
    assert 0 < len(found) <= 12
    shipped = config(f"{module}.{kernel}", f"half/{outputs}", torch.device("cpu"))
    assert all(candidate.keys() == shipped.keys() for candidate in found)


@pytest.mark.parametrize(
    ("match", "change"),
    [
        (r"features has shape \(1, 4, 3, 3\); expected \(1, 4, 6, 6\)",
         {"features": [torch.zeros(1, 4, 6, 6), torch.zeros(1, 4, 3, 3)]}),
        (r"weights has shape \(5, 7, 3, 3\); expected \(5, 4, 3, 3\)",
         {"weights": [torch.zeros(5, 4, 3, 3), torch.zeros(5, 7, 3, 3)]}),
        ("got 1 features, 2 weights, 3 dilations", {"dilations": [1, 2, 3]}),
        ("dilations has 0; expected 1 to", {"dilations": [1, 0]}),
        (r"bias has shape \(9,\); expected \(10,\)", {"bias": torch.zeros(9)}),
        ("scale is torch.float64", {"scale": torch.zeros(10).double()}),
        (r"projection_weight has shape \(3, 9\); expected \(3, 10\)",
         {"projection_weight": torch.zeros(3, 9)}),
        ("features is torch.float64", {"features": [torch.zeros(1, 4, 6, 6).double()]}),
    ],
)  # fmt: skip
def test_a_direct_call_that_does_not_fit_is_refused(match, change):
    call = {
        "features": [torch.zeros(1, 4, 6, 6)], "weights": [torch.zeros(5, 4, 3, 3)] * 2, "bias": None,
        "dilations": [1, 2], "scale": None, "shift": None, "activation": "none", "projection_weight": None,
        "projection_bias": None, "keep": False,
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"dilated_aspp_forward: {match}"):
        dilated_aspp.forward(**call | change)
    good = [torch.zeros(1, 4, 6, 6)], [torch.zeros(5, 4, 3, 3)], torch.zeros(0), None, None, [1], "none"
    with pytest.raises(ValueError, match=r"dilated_aspp_backward: grad has shape \(1, 5, 3, 3\)"):
        dilated_aspp_backward.backward(torch.zeros(1, 5, 3, 3), *good, [True] * 5)


def test_float32_obeys_the_switch_of_convolutions():
    """PyTorch has one for cuBLAS's products and another for cuDNN's convolutions."""
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    products = {"ieee": "tf32x3", "tf32": "tf32"}
    try:
        for one, other in (("ieee", "tf32"), ("tf32", "ieee")):
            conv.fp32_precision, matmul.fp32_precision = one, other
            assert launch.dot_precision(torch.float32, convolution=True) == products[one]
            assert launch.dot_precision(torch.float32) == products[other]
            with launch.noting(90):
                next(call for name, call in dilated_aspp.examples() if "sizes of 1, tf32" in name)()
    finally:
        conv.fp32_precision, matmul.fp32_precision = before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: C++ would serve")
def test_public_operator_on_a_device(device, dtype, assert_accurate):
    case = dataclasses.replace(CASES[1], norm=False)
    found, grad = leaves(on(device, case.tensors()), dtype), case.grad().to(device, dtype)
    truth = run_public(case, leaves(found, torch.float64), grad.double(), "reference")
    eager = run_public(case, leaves(found, dtype), grad, "reference")
    results = run_public(case, found, grad, "triton")
    for name, exact in truth.items():
        assert_accurate(results[name], eager[name], exact, name)
    maps, weights, bias = arguments(case, found)
    call = (maps, weights, bias, list(case.dilations), None, None, "gelu", found["pw"], found["pb"], True)
    torch.library.opcheck(torch.ops.rskernels.dilated_aspp_forward.default, call)
    with rskernels.backend("triton"):
        compiled = torch.compile(case.call, fullgraph=True)(found)
    assert torch.equal(compiled, results["out"])
