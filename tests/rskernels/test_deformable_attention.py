"""deformable_attention: the reference against bilinear sampling written out by hand in float64."""

import math

import pytest
import torch

import rskernels

LEVELS = ((4, 5), (2, 3), (1, 1))


def formula(value, shapes, locations, weights):
    """Loops, and bilinear interpolation from its definition."""
    batch, _, heads, dim = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    out = []
    for b in range(batch):
        for q in range(queries):
            for h in range(heads):
                total, first = torch.zeros(dim, dtype=value.dtype), 0
                for level, (height, width) in enumerate(shapes):
                    for p in range(points):
                        x = locations[b, q, h, level, p, 0] * width - 0.5
                        y = locations[b, q, h, level, p, 1] * height - 0.5
                        left, top = math.floor(x.item()), math.floor(y.item())
                        for i in (top, top + 1):
                            for j in (left, left + 1):
                                if 0 <= i < height and 0 <= j < width:
                                    share = (1 - (y - i).abs()) * (1 - (x - j).abs())
                                    pixel = value[b, first + i * width + j, h]
                                    total = total + weights[b, q, h, level, p] * share * pixel
                    first += height * width
                out.append(total)
    return torch.stack(out).view(batch, queries, heads * dim)


def inputs(dtype=torch.float64, *, batch=2, heads=2, dim=3, queries=4, points=2, spread=1.0):
    pixels = sum(h * w for h, w in LEVELS)
    value = torch.randn(batch, pixels, heads, dim, dtype=dtype, requires_grad=True)
    shape = (batch, queries, heads, len(LEVELS), points)
    locations = (0.5 + spread * (torch.rand(*shape, 2, dtype=torch.float64) - 0.5)).to(dtype).requires_grad_()
    weights = torch.rand(*shape, dtype=dtype, requires_grad=True)
    return value, locations, weights


@pytest.mark.parametrize("spread", (1.0, 3.0))  # 3: many points outside the maps
def test_matches_formula_and_gradients(spread):
    leaves = inputs(spread=spread)
    value, locations, weights = leaves
    out = rskernels.deformable_attention(value, LEVELS, locations, weights)
    expected = formula(value, LEVELS, locations, weights)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_gradcheck():
    leaves = inputs(batch=1, queries=2, heads=1)
    assert torch.autograd.gradcheck(lambda v, s, w: rskernels.deformable_attention(v, LEVELS, s, w), leaves)


def test_corner_convention():
    """(0, 0) is the corner of the first pixel, its centre lies half a pixel in."""
    value = torch.zeros(1, 20, 1, 1)
    value[0, 0] = 1
    at = torch.tensor([[0.5 / 5, 0.5 / 4], [0.0, 0.0], [1.5 / 5, 0.5 / 4]]).view(1, 3, 1, 1, 1, 2)
    out = rskernels.deformable_attention(value, [(4, 5)], at, torch.ones(1, 3, 1, 1, 1))
    torch.testing.assert_close(out.flatten(), torch.tensor([1.0, 0.25, 0.0]))


@pytest.mark.parametrize("value_dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("autocast", (False, True))
def test_locations_keep_their_precision(relative_error, value_dtype, autocast):
    value, locations, weights = (t.detach() for t in inputs())
    value = value.to(value_dtype)
    expected = rskernels.deformable_attention(value.double(), LEVELS, locations, weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = rskernels.deformable_attention(value, LEVELS, locations.float(), weights.float())
    assert out.dtype == value_dtype
    assert relative_error(out, expected) < (1e-6 if value_dtype == torch.float32 else 5e-3)


def test_compiles_as_one_graph():
    value, locations, weights = inputs(torch.float32)
    compiled = torch.compile(rskernels.deformable_attention, fullgraph=True, backend="aot_eager")
    out = compiled(value, LEVELS, locations, weights)
    torch.testing.assert_close(out, rskernels.deformable_attention(value, LEVELS, locations, weights))
    out.sum().backward()


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (TypeError, "spatial_shapes is a tensor", {"spatial_shapes": torch.tensor(LEVELS)}),
        (ValueError, r"value has shape \(27, 2, 3\)", {"value": torch.zeros(27, 2, 3)}),
        (ValueError, "spatial_shapes is empty", {"spatial_shapes": (), "value": torch.zeros(2, 0, 2, 3)}),
        (ValueError, "expected sides of at least 1", {"spatial_shapes": ((-4, -5), (2, 3), (1, 1))}),
        (ValueError, "value has 27 pixels; expected 26", {"spatial_shapes": ((4, 5), (2, 3))}),
        (
            ValueError,
            r"sampling_locations has shape \(2, 4, 2, 2, 2, 2\)",
            {"sampling_locations": torch.zeros(2, 4, 2, 2, 2, 2)},
        ),
        (
            ValueError,
            r"attention_weights has shape \(2, 4, 2, 3, 1\)",
            {"attention_weights": torch.zeros(2, 4, 2, 3, 1)},
        ),
        (
            TypeError,
            "attention_weights is torch.int64",
            {"attention_weights": torch.zeros(2, 4, 2, 3, 2).long()},
        ),
    ],
)
def test_bad_arguments(error, match, changes):
    value, locations, weights = inputs()
    arguments = {
        "value": value,
        "spatial_shapes": LEVELS,
        "sampling_locations": locations,
        "attention_weights": weights,
    }
    with pytest.raises(error, match=match):
        rskernels.deformable_attention(**(arguments | changes))
