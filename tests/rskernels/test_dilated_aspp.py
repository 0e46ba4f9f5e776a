"""dilated_aspp: its reference against unfolded windows, its errors."""

import math

import pytest
import torch

import rskernels

DILATIONS = (1, 2, 3)
OUT = (3, 1, 2)


def formula(features, weights, biases, dilations, scale_shift, activation, projection):
    """Nine shifted copies per branch, no convolution."""
    branches = []
    for x, weight, bias, d in zip(features, weights, biases, dilations, strict=True):
        height, width = x.shape[2:]
        padded = torch.nn.functional.pad(x, (d, d, d, d))
        out = 0
        for i in range(3):
            for j in range(3):
                window = padded[:, :, i * d : i * d + height, j * d : j * d + width]
                out = out + torch.einsum("bchw,oc->bohw", window, weight[:, :, i, j])
        branches.append(out if bias is None else out + bias[None, :, None, None])
    out = torch.cat(branches, 1)
    if scale_shift is not None:
        out = out * scale_shift[0][None, :, None, None] + scale_shift[1][None, :, None, None]
    if activation == "relu":
        out = out * (out > 0)
    elif activation == "gelu":
        out = out * 0.5 * (1 + torch.erf(out / math.sqrt(2)))
    elif activation == "gelu_tanh":
        out = out * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (out + 0.044715 * out**3)))
    if projection is not None:
        out = torch.einsum("bchw,pc->bphw", out, projection[0])
        out = out if projection[1] is None else out + projection[1][None, :, None, None]
    return out


def arguments(dtype=torch.float64, *, bias=True, projection=False, scale_shift=False):
    def leaf(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    return {
        "features": [leaf(2, 4, 6, 5) for _ in OUT],
        "weights": [leaf(o, 4, 3, 3) for o in OUT],
        "biases": [leaf(o) if bias else None for o in OUT],
        "dilations": DILATIONS,
        "scale_shift": tuple(torch.randn(6, dtype=dtype) for _ in range(2)) if scale_shift else None,
        "projection": (leaf(7, 6), leaf(7) if bias else None) if projection else None,
    }


def leaves_of(args):
    found = [*args["features"], *args["weights"], *args["biases"], *(args["projection"] or ())]
    return [t for t in found if t is not None]


@pytest.mark.parametrize("activation", (None, "relu", "gelu", "gelu_tanh"))
@pytest.mark.parametrize("projection", (False, True))
@pytest.mark.parametrize("scale_shift", (False, True))
@pytest.mark.parametrize("bias", (False, True))
def test_matches_formula_and_gradients(activation, projection, scale_shift, bias):
    args = arguments(bias=bias, projection=projection, scale_shift=scale_shift)
    out = rskernels.dilated_aspp(**args, activation=activation)
    expected = formula(**args, activation=activation)
    torch.testing.assert_close(out, expected)
    grad, leaves = torch.randn_like(out), leaves_of(args)
    for ours, theirs in zip(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_one_feature_is_repeated_and_default_dilations():
    x = torch.randn(1, 4, 40, 38, dtype=torch.float64)
    weights = [torch.randn(2, 4, 3, 3, dtype=torch.float64) for _ in range(4)]
    out = rskernels.dilated_aspp(x, weights, [None] * 4)
    torch.testing.assert_close(out, formula([x] * 4, weights, [None] * 4, (1, 6, 12, 18), None, None, None))


def test_gradcheck():
    args = arguments(projection=True)

    def call(x, weight, bias, projection):
        return rskernels.dilated_aspp(
            [x], [weight], [bias], dilations=[2], activation="gelu", projection=(projection, None)
        )

    leaves = (
        args["features"][0],
        args["weights"][0],
        args["biases"][0],
        torch.randn(2, 3).double().requires_grad_(),
    )
    assert torch.autograd.gradcheck(call, leaves)


def test_autocast_and_mixed_dtypes():
    args = arguments(torch.float32, projection=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = rskernels.dilated_aspp(**args)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in leaves_of(args))
    args["features"] = [x.detach().bfloat16() for x in args["features"]]
    assert rskernels.dilated_aspp(**args).dtype == torch.float32


def test_compiles_as_one_graph():
    args = arguments(torch.float32, projection=True, scale_shift=True)
    compiled = torch.compile(rskernels.dilated_aspp, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(**args, activation="relu"), rskernels.dilated_aspp(**args, activation="relu")
    )


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (ValueError, "3 features, 3 weights, 2 biases, 3 dilations", {"biases": [None, None]}),
        (
            ValueError,
            r"features\[1\] has shape \(2, 4, 6, 4\)",
            {"features": [torch.zeros(2, 4, 6, w) for w in (5, 4, 5)]},
        ),
        (
            ValueError,
            r"weights\[0\] has shape \(3, 4, 1, 1\); expected \(O, 4, 3, 3\)",
            {"weights": [torch.zeros(3, 4, 1, 1)] * 3},
        ),
        (ValueError, r"biases\[1\] has shape \(3,\); expected \(1,\)", {"biases": [torch.zeros(3)] * 3}),
        (ValueError, r"dilations\[2\] is 0", {"dilations": (1, 1, 0)}),
        (ValueError, "activation is 'silu'", {"activation": "silu"}),
        (
            ValueError,
            r"scale has shape \(5,\); expected \(6,\)",
            {"scale_shift": (torch.zeros(5), torch.zeros(6))},
        ),
        (
            ValueError,
            "shift requires grad",
            {"scale_shift": (torch.zeros(6), torch.zeros(6, requires_grad=True))},
        ),
        (ValueError, r"projection weight has shape \(7, 5\)", {"projection": (torch.zeros(7, 5), None)}),
        (
            ValueError,
            r"projection bias has shape \(6,\)",
            {"projection": (torch.zeros(7, 6), torch.zeros(6))},
        ),
        (TypeError, "projection weight is torch.int64", {"projection": (torch.zeros(7, 6).long(), None)}),
    ],
)
def test_bad_arguments(error, match, changes):
    with pytest.raises(error, match=match):
        rskernels.dilated_aspp(**(arguments() | changes))
