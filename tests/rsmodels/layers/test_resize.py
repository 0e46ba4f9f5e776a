"""layers/resize.py: a convolution of a resized map, computed at the small size, is that convolution."""

import pytest
import torch
import torch.nn.functional as F

from rsmodels.layers import conv_of_resized, resize

SIZES = [
    ((5, 7), (20, 28)),
    ((4, 3), (9, 11)),
    ((9, 9), (38, 38)),
    ((6, 6), (6, 6)),
    ((8, 8), (3, 5)),
    ((1, 2), (6, 6)),
]


def formula(x, size, weight, bias=None):
    resized = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    return F.conv2d(resized, weight, bias, padding=1)


@pytest.mark.parametrize("small, large", SIZES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_conv_of_resized_equals_both_in_turn(small, large, with_bias: bool, channels_last: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, *small, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True) if with_bias else None
    inputs = [t for t in (x.requires_grad_(), weight, bias) if t is not None]
    found, expected = conv_of_resized(x, large, weight, bias), formula(x, large, weight, bias)
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(expected)
    ours = torch.autograd.grad(found, inputs, direction)
    theirs = torch.autograd.grad(expected, inputs, direction)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_bf16_is_as_near_as_both_in_turn() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 32, 8, 8), torch.randn(16, 32, 3, 3) / 17, torch.randn(16)
    exact = formula(x.double(), (32, 32), weight.double(), bias.double())
    with torch.autocast("cpu", torch.bfloat16):
        found, eager = (f(x, (32, 32), weight, bias) for f in (conv_of_resized, formula))
    assert found.dtype == torch.bfloat16
    errors = [float((t.double() - exact).norm() / exact.norm()) for t in (found, eager)]
    assert errors[0] < max(5e-3, 1.5 * errors[1])


def test_resize_leaves_the_right_size_alone() -> None:
    x = torch.randn(1, 2, 4, 4)
    assert resize(x, (4, 4)) is x
    assert resize(x, [8, 2]).shape == (1, 2, 8, 2)
