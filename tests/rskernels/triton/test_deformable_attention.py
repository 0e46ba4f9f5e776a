"""deformable_attention's Triton launchers against the reference in float64: output and every gradient.

On the GPU where there is one, else in Triton's interpreter.
"""

import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from deformable_attention_cases import NAMES, Case, leaves
from hypothesis import given, settings
from hypothesis import strategies as st

import rskernels
from rskernels import deformable_attention
from rskernels.triton import deformable_attention as launchers
from rskernels.triton import deformable_attention_backward as backward
from rskernels.triton import deformable_attention_tiles as tiles
from rskernels.triton.launch import CHIPS, CONFIGS, launch

SMALL = Case(batch=2, queries=11, heads=2, dim=16, shapes=((4, 5), (2, 3), (1, 1)), points=2)


def launched(case, arguments, grad, device="cpu", mask=(True, True, True)):
    """Output and gradients from the launchers, on the CPU."""
    value, locations, weights = (t.detach().to(device) for t in arguments)
    sides = [side for shape in case.shapes for side in shape]
    out = launchers.forward(value, sides, locations, weights)
    gradients = launchers.backward(grad.to(device, out.dtype), value, sides, locations, weights, list(mask))
    return [t.cpu() for t in (out, *gradients)]


def reference(case, arguments, grad):
    value, locations, weights = (t.detach().requires_grad_() for t in arguments)
    with rskernels.backend("reference"):
        out = deformable_attention(value, case.shapes, locations, weights)
    return [out.detach(), *torch.autograd.grad(out, (value, locations, weights), grad.to(out.dtype))]


def compare(case, assert_accurate, device, *dtypes):
    arguments = leaves(case.arguments(), *dtypes)
    grad = case.grad().to(dtypes[0])
    truths = reference(case, leaves(arguments, torch.float64), grad)
    eagers = reference(case, arguments, grad)
    values = launched(case, arguments, grad, device)
    for name, value, eager, truth, like in zip(
        NAMES, values, eagers, truths, (arguments[0], *arguments), strict=True
    ):
        assert value.dtype == like.dtype, name
        assert_accurate(value, eager, truth, f"{name} of {case}")


CASES = [
    SMALL,
    replace(SMALL, dim=1, points=1, heads=1),
    replace(SMALL, dim=7, shapes=((1, 1),), points=1),
    replace(SMALL, dim=33, shapes=((1, 7), (5, 1))),
    replace(SMALL, batch=1, dim=80, heads=1, queries=1),
    replace(SMALL, batch=1, dim=300, heads=1, shapes=((3, 3),)),  # more channels than a tile
    replace(SMALL, batch=1, heads=1, queries=60, points=5, shapes=((2, 2), (3, 2))),  # many samples per pixel
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_float64_reference(case, assert_accurate, device, dtype):
    compare(case, assert_accurate, device, dtype)
    compare(case, assert_accurate, device, dtype, torch.float32)


@settings(max_examples=10)
@given(
    case=st.builds(
        Case,
        batch=st.integers(1, 2),
        queries=st.integers(1, 20),
        heads=st.integers(1, 2),
        dim=st.integers(1, 70) | st.sampled_from([16, 32, 64]),
        shapes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=3).map(tuple),
        points=st.integers(1, 4),
        magnitude=st.sampled_from([1e-3, 1.0, 1e3]),
        seed=st.integers(0, 2**16),
    ),
)
def test_matches_the_float64_reference_on_any_shape(case, assert_accurate, device):
    compare(case, assert_accurate, device, torch.float32)


def test_unusual_locations(assert_accurate, device):
    """Far outside and on borders as in the reference; NaN and infinity spoil their query's head alone."""
    case = Case(batch=1, queries=20, heads=2, dim=16, shapes=((4, 5), (3, 1)), points=2)
    value, locations, weights = (t.detach() for t in leaves(case.arguments(), torch.float32))
    borders = (0.0, 1.0, -0.0, 0.5, -1e-7, 1.0 + 1e-7, -1e9, 1e9, 2.0**31, -(2.0**33), 1e30, -1e30, 1e-40)
    for query, at in enumerate(borders):
        locations[0, query, 0, :, 0, query % 2] = at
        locations[0, query, 1, :, :, :] = at
    grad = torch.ones(1, 20, 32)
    clean, *clean_gradients = launched(case, (value, locations, weights), grad, device)
    expected = reference(case, [t.double() for t in (value, locations, weights)], grad)
    eager = reference(case, (value, locations, weights), grad)
    assert_accurate(clean, eager[0], expected[0], "unusual locations")
    assert_accurate(clean_gradients[0], eager[1], expected[1], "value's gradient of unusual locations")

    nowhere = (math.nan, math.inf, -math.inf)
    for query, at in enumerate(nowhere, len(borders)):
        locations[0, query, 1, 1, 0, query % 2] = at
    spoiled, *gradients = launched(case, (value, locations, weights), grad, device)
    spoiled, clean = spoiled.view(20, 2, 16), clean.view(20, 2, 16)
    for query, _ in enumerate(nowhere, len(borders)):
        assert spoiled[query, 1].isnan().all()
        spoiled[query, 1] = clean[query, 1]
        for gradient, clean_gradient in zip(gradients[1:], clean_gradients[1:], strict=True):
            assert gradient[0, query, 1, 1, 0].isnan().all()
            gradient[0, query, 1, 1, 0] = clean_gradient[0, query, 1, 1, 0]
    assert torch.equal(spoiled, clean)
    assert gradients[0].isfinite().all()
    for gradient, clean_gradient in zip(gradients[1:], clean_gradients[1:], strict=True):
        assert torch.equal(gradient, clean_gradient)


def test_nan_pixel_spoils_only_who_samples_it(device):
    case = Case(batch=1, heads=1, queries=100, shapes=((5, 6),), points=1)
    value, locations, weights = (t.detach() for t in leaves(case.arguments(), torch.float32))
    clean, *_ = launched(case, (value, locations, weights), case.grad(), device)
    value[0, 0] = torch.nan  # the upper left pixel: clamped indices would drag it in from outside
    spoiled, *gradients = launched(case, (value, locations, weights), case.grad(), device)
    position = locations[0, :, 0, 0, 0] * torch.tensor([6.0, 5.0]) - 0.5
    touches = ((position > -1) & (position < 1)).all(-1)
    assert 0 < touches.sum() < 100
    assert spoiled[0, touches].isnan().all()
    assert torch.equal(spoiled[0, ~touches], clean[0, ~touches])
    for gradient in gradients[1:]:
        assert gradient[0, ~touches].isfinite().all()


def test_nan_query_spoils_only_its_own_pixels(device):
    case = replace(SMALL, batch=1, shapes=((4, 5),))
    arguments = [t.detach() for t in leaves(case.arguments(), torch.float32)]
    arguments[1][0, 3, 0, 0] = torch.tensor([[0.33, 0.4], [0.71, 0.6]])
    clean = launched(case, arguments, case.grad(), device)[1]
    grad = case.grad()
    grad[0, 3, :16] = torch.nan  # the first head
    spoiled = launched(case, arguments, grad, device)[1]
    position = arguments[1][0, 3, 0, 0] * torch.tensor([5.0, 4.0]) - 0.5
    y, x = torch.meshgrid(torch.arange(4), torch.arange(5), indexing="ij")
    far = [((p[0] - x).abs() >= 1) | ((p[1] - y).abs() >= 1) for p in position]
    touched = ~torch.stack(far).all(0).flatten()
    assert touched.sum() == 8
    assert spoiled[0, touched, 0].isnan().all()
    assert torch.equal(spoiled[0, ~touched, 0], clean[0, ~touched, 0])
    assert torch.equal(spoiled[0, :, 1], clean[0, :, 1])


def test_huge_values_and_weights_stay_finite(device, dtype):
    case = replace(SMALL, magnitude=1e15 if dtype != torch.float16 else 1e3)
    value, locations, weights = leaves(case.arguments(), dtype, torch.float32)
    scale = 1e15 if dtype != torch.float16 else 1.0
    results = launched(case, (value, locations, weights * scale), case.grad(), device)
    assert all(t.isfinite().all() for t in results)


@pytest.mark.parametrize("mask", list(itertools.product((True, False), repeat=3))[1:], ids=str)
def test_only_wanted_gradients_exist_and_are_right(mask, device):
    case = replace(SMALL, batch=1, shapes=((3, 4), (2, 1)))
    arguments = leaves(case.arguments(), torch.float32)
    _, *everything = launched(case, arguments, case.grad(), device)
    _, *some = launched(case, arguments, case.grad(), device, mask)
    for wanted, value, expected in zip(mask, some, everything, strict=True):
        assert torch.equal(value, expected) if wanted else value.numel() == 0


def test_reads_any_strides(device):
    case = replace(SMALL, heads=3, dim=20, shapes=((3, 4),))
    dense, locations, weights = (t.detach() for t in leaves(case.arguments(), torch.float32))
    expected = launched(case, (dense, locations, weights), case.grad(), device)
    for value in (
        dense.transpose(1, 2).contiguous().transpose(1, 2),
        dense.transpose(1, 3).contiguous().transpose(1, 3),
        torch.cat([dense.flatten(2)] * 2, 2)[..., :60].unflatten(2, (3, 20)),
    ):
        assert not value.is_contiguous()
        strided = (
            value,
            locations.transpose(1, 2).contiguous().transpose(1, 2),
            weights.transpose(1, 4).contiguous().transpose(1, 4),
        )
        for ours, truth in zip(launched(case, strided, case.grad(), device), expected, strict=True):
            assert torch.equal(ours, truth)
    ones = torch.ones(()).expand(2, 11, 60)  # as sum() gives it: strides of 0
    for ours, truth in zip(
        launched(case, (dense, locations, weights), ones, device),
        launched(case, (dense, locations, weights), ones.contiguous(), device),
        strict=True,
    ):
        assert torch.equal(ours, truth)


@pytest.mark.parametrize("case", [SMALL, CASES[3]], ids=str)
def test_same_bits_twice(case, device, dtype):
    """Outputs and buffers are poisoned first, so this also sees every element written."""
    arguments = leaves(case.arguments(), dtype, torch.float32)
    first, second = (launched(case, arguments, case.grad(), device) for _ in range(2))
    for name, value, again in zip(NAMES, first, second, strict=True):
        assert torch.equal(value, again) and value.isfinite().all(), name


@pytest.mark.parametrize(
    "sizes", ((0, 4, 2, 3, 1), (2, 0, 2, 3, 1), (2, 4, 0, 3, 1), (2, 4, 2, 0, 1), (2, 4, 2, 3, 0)), ids=str
)
def test_empty(sizes, device):
    batch, queries, heads, dim, points = sizes
    case = Case(batch, queries, heads, dim, ((2, 3), (1, 1)), points)
    out, *gradients = launched(case, leaves(case.arguments(), torch.float32), case.grad(), device)
    assert out.shape == (batch, queries, heads * dim) and not out.any()
    for gradient, argument in zip(gradients, case.arguments(), strict=True):
        assert gradient.shape == argument.shape and not gradient.any()


def test_another_image_size_is_not_another_kernel():
    """Nothing that the compiler makes a build of its own of: sizes of 1, multiples of 16. In a process that
    does not interpret kernels."""
    program = """
import torch
from rskernels.triton import aot, deformable_attention as launchers
from rskernels.triton.launch import noting

found = []
for levels, queries in [(((16, 16), (8, 8)), 320), (((13, 17), (1, 9)), 229), (((9, 7), (4, 4)), 1)]:
    sides = [side for level in levels for side in level]
    value = torch.empty(2, sum(height * width for height, width in levels), 2, 32)
    locations = launchers.sampled(levels, queries, 2, 4)
    with noting(90) as launches:
        out = launchers.forward(value, sides, locations, locations[..., 0])
        launchers.backward(out, value, sides, locations, locations[..., 0], [True] * 3)
    found.append({one.kernel.fn.__name__: aot._specialise(one)[:3] for one in launches})
    del found[-1]["gather_kernel"][1]["BLOCK_K"]  # of how many samples there are
assert set(found[0]) == {"forward_kernel", "samples_kernel", "keys_kernel", "gather_kernel"}
for other in found[1:]:
    for kernel, build in other.items():
        assert build == found[0][kernel], (kernel, build, found[0][kernel])
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_tuner_replays_the_runs_that_samples_make(monkeypatch, device):
    levels = ((4, 5), (2, 3), (1, 1))
    locations = launchers.sampled(levels, 30, 2, 3) * 1.2 - 0.1  # some outside
    written = []

    def launched(kernel, grid, *arguments, **constants):
        launch(kernel, grid, *arguments, **constants)
        if kernel is backward.keys_kernel:
            written.append(arguments[2].clone())

    monkeypatch.setattr(backward, "launch", launched)
    sides = tuple(side for level in levels for side in level)
    call = (torch.zeros(2, 30, 16), torch.zeros(2, 27, 2, 8), locations, torch.zeros(locations.shape[:-1]))
    grad, value, places, weights = (x.to(device) for x in call)
    backward.value_gradient(grad, value, sides, places, weights)
    cells = sum((height + 1) * (width + 1) for height, width in levels)
    expected = backward.noted_keys(locations, list(levels), cells)
    assert torch.equal(written[0].cpu().long(), expected)
    assert 0 < (expected == 2 * 2 * cells).float().mean() < 0.5


@pytest.mark.parametrize("kernel", ["forward_kernel", "samples_kernel", "gather_kernel"])
def test_every_tile_is_right(kernel, assert_accurate, device, monkeypatch):
    """Those that are shipped and those that a tuner tries, whatever they were meant for."""
    rows = []
    for chip in CHIPS:
        shipped = json.loads((CONFIGS / f"deformable_attention.sm{chip}.json").read_text())
        rows += shipped[f"deformable_attention.{kernel}"].values()
    for density, channels in itertools.product(("few", "some", "many"), (16, 32, 64, 128, 256)):
        part = f"/{density}" if kernel == "gather_kernel" else ""
        tried = launchers.candidates(kernel, f"float{part}/d{channels}")
        assert 0 < len(tried) <= 12
        rows += tried
    case = replace(SMALL, batch=1, shapes=((2, 3), (1, 1)))

    configured, current = tiles.config, {}

    def chosen(name, *rest):
        return dict(current) if name.endswith(kernel) else configured(name, *rest)

    monkeypatch.setattr(tiles, "config", chosen)
    monkeypatch.setattr(backward, "config", chosen)
    side = "BLOCK_K" if kernel == "gather_kernel" else "BLOCK_R"
    for row in {row[side]: row for row in rows}.values():
        current = row
        compare(case, assert_accurate, device, torch.float32)


def test_a_direct_call_that_does_not_fit_is_refused():
    value, locations, weights = (t.detach() for t in leaves(SMALL.arguments(), torch.float32))
    sides = [4, 5, 2, 3, 1, 1]
    for bad in ([4, 5, 2, 3, 1, 2], [-4, -5, 2, 3, 1, 1], [4, 5, 2, 3]):
        with pytest.raises(ValueError, match="deformable_attention_forward"):
            launchers.forward(value, bad, locations, weights)
    with pytest.raises(ValueError, match="sampling_locations has shape"):
        launchers.forward(value, sides, locations[..., :1], weights)
    with pytest.raises(ValueError, match=r"attention_weights is torch\.float64"):
        launchers.forward(value, sides, locations, weights.double())
    with pytest.raises(ValueError, match=r"grad is torch\.float32 of shape \(2, 10, 32\)"):
        launchers.backward(torch.zeros(2, 10, 32), value, sides, locations, weights, [True] * 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_public_operator_on_the_device(assert_accurate, dtype):
    case = Case(dim=32)
    arguments = leaves(case.arguments(), dtype, torch.float32)
    grad = case.grad().to(dtype)
    truths = reference(case, leaves(arguments, torch.float64), grad)
    eagers = reference(case, arguments, grad)
    device_arguments = [t.detach().cuda().requires_grad_() for t in arguments]
    value, locations, weights = device_arguments
    sides = [side for shape in case.shapes for side in shape]
    forward = torch.ops.rskernels.deformable_attention_forward.default
    torch.library.opcheck(forward, (value, sides, locations, weights))
    with rskernels.backend("triton"):
        for form in (deformable_attention, torch.compile(deformable_attention, fullgraph=True)):
            out = form(value, case.shapes, locations, weights)
            values = [out.detach(), *torch.autograd.grad(out, device_arguments, grad.cuda())]
            for name, result, eager, truth in zip(NAMES, values, eagers, truths, strict=True):
                assert_accurate(result.cpu(), eager, truth, name)
