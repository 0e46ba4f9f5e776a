"""cross_attention: what every backend promises, against the written-out softmax in float64.

The C++ kernels' own tests are in test_cross_attention_cpp.py.
"""

import pytest
import torch

import rskernels


def formula(q, k, v, *, mask=None, scale=None, drop_first_key_value=False):
    """Loops over batch, head and query; nothing shared with the package."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        k_b, v_b = k[b if k.shape[0] > 1 else 0], v[b if v.shape[0] > 1 else 0]
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                weights = torch.exp(scale * (k_b[h] @ q[b, h, i]))
                if mask is not None and mask[b, i].any():
                    weights = weights * mask[b, i]
                weights = weights / weights.sum()
                first = 1 if drop_first_key_value else 0
                out[b, h, i] = weights[first:] @ v_b[h, first:]
    return out


def inputs(*, batch=2, shared=(False, False), heads=3, queries=5, keys=7, dim=8, dtype=torch.float64):
    def leaf(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    k_batch, v_batch = (1 if s else batch for s in shared)
    return leaf(batch, heads, queries, dim), leaf(k_batch, heads, keys, dim), leaf(v_batch, heads, keys, dim)


def random_mask(batch=2, queries=5, keys=7):
    mask = torch.rand(batch, queries, keys) > 0.5
    mask[0, 1] = False  # attends nowhere
    mask[1, 2] = True
    return mask


@pytest.mark.parametrize("drop", (False, True))
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("shared", ((False, False), (True, True), (True, False)))
@pytest.mark.parametrize("scale", (None, 0.3))
def test_matches_formula_and_gradients(drop, masked, shared, scale):
    leaves = inputs(shared=shared)
    options = {"mask": random_mask() if masked else None, "scale": scale, "drop_first_key_value": drop}
    out, expected = rskernels.cross_attention(*leaves, **options), formula(*leaves, **options)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dim", (1, 16, 40, 257))
def test_head_dims_and_single_tokens(dim):
    for queries, keys in ((1, 1), (1, 9), (9, 1)):
        leaves = inputs(heads=1, queries=queries, keys=keys, dim=dim)
        torch.testing.assert_close(rskernels.cross_attention(*leaves), formula(*leaves))


def test_gradcheck():
    leaves = inputs(queries=3, keys=4, dim=2, heads=1, shared=(True, False))
    mask = random_mask(queries=3, keys=4)
    assert torch.autograd.gradcheck(
        lambda *a: rskernels.cross_attention(*a, mask=mask, drop_first_key_value=True), leaves
    )


@pytest.mark.parametrize(("dtype", "bound"), ((torch.float32, 2e-6), (torch.bfloat16, 5e-3)))
def test_low_precision(relative_error, dtype, bound):
    leaves = [t.detach() for t in inputs(queries=40, keys=60, dim=32, dtype=dtype)]
    mask = random_mask(queries=40, keys=60)
    out = rskernels.cross_attention(*leaves, mask=mask)
    assert out.dtype == dtype
    assert relative_error(out, formula(*(t.double() for t in leaves), mask=mask)) < bound


def test_large_logits_stay_finite_and_nan_stays_in_its_row():
    q, k, v = (t.detach().float() for t in inputs())
    assert torch.isfinite(rskernels.cross_attention(1e4 * q, k, v, scale=1.0, mask=random_mask())).all()
    q[0, 0, 3, 0] = float("nan")
    out = rskernels.cross_attention(q, k, v)
    assert torch.isnan(out[0, 0, 3]).all()  # F.scaled_dot_product_attention gives zeros here
    out[0, 0, 3] = 0
    assert torch.isfinite(out).all()


def test_autocast_and_mixed_dtypes():
    q, k, v = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = rskernels.cross_attention(q, k, v)
        assert out.dtype == torch.bfloat16
        assert rskernels.cross_attention(q.double(), k, v).dtype == torch.float64
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32
    assert rskernels.cross_attention(q, k.bfloat16(), v).dtype == torch.float32


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (ValueError, r"q has shape \(3, 5, 8\); expected 4 dimensions", {"q": torch.zeros(3, 5, 8)}),
        (
            ValueError,
            r"k has shape \(3, 3, 7, 8\); expected \(2 or 1, 3, 7, 8\)",
            {"k": torch.zeros(3, 3, 7, 8)},
        ),
        (ValueError, r"v has shape \(2, 3, 6, 8\)", {"v": torch.zeros(2, 3, 6, 8)}),
        (ValueError, "at least one key", {"k": torch.zeros(2, 3, 0, 8), "v": torch.zeros(2, 3, 0, 8)}),
        (ValueError, r"mask has shape \(2, 7\); expected \(2, 5, 7\)", {"mask": torch.ones(2, 7) > 0}),
        (TypeError, "mask is torch.float32; expected torch.bool", {"mask": torch.ones(2, 5, 7)}),
        (TypeError, "v is torch.int64", {"v": torch.zeros(2, 3, 7, 8, dtype=torch.int64)}),
    ],
)
def test_bad_arguments(error, match, changes):
    arguments = dict(zip("qkv", inputs(), strict=True)) | changes
    with pytest.raises(error, match=match):
        rskernels.cross_attention(**arguments)
