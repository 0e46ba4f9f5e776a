"""methods/losses.py against formulas written out in float64."""

import pytest
import torch

from rsmodels.methods.losses import segmentation_losses


def by_hand(logits, mask, *, activation="sigmoid", ignore=255):
    logits = logits.double()
    _batch, classes, *_ = logits.shape
    kept = [
        (b, y, x)
        for b, y, x in torch.cartesian_prod(*map(torch.arange, mask.shape)).tolist()
        if mask[b, y, x] != ignore
    ]
    ce, overlap, sizes = 0.0, [0.0] * classes, [0.0] * classes
    for b, y, x in kept:
        z, label = logits[b, :, y, x], int(mask[b, y, x])
        target = [float(label == 1)] if classes == 1 else [float(label == k) for k in range(classes)]
        p = z.softmax(0) if activation == "softmax" and classes > 1 else z.sigmoid()
        if activation == "softmax" and classes > 1:
            ce -= p[label].log()
        else:
            ce -= sum(t * p[k].log() + (1 - t) * (1 - p[k]).log() for k, t in enumerate(target)) / classes
        for k, t in enumerate(target):
            overlap[k] += p[k] * t
            sizes[k] += p[k] + t
    dice = sum(1 - (2 * o + 1) / (s + 1) for o, s in zip(overlap, sizes, strict=True)) / classes
    return ce / len(kept), dice


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_values(classes: int, activation: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, classes, 4, 5)
    mask = torch.randint(0, max(classes, 2), (2, 4, 5))
    mask[0, :2] = 255
    terms = segmentation_losses(logits, mask, activation=activation)
    ce, dice = by_hand(logits, mask, activation=activation)
    torch.testing.assert_close(terms["ce"].double(), ce, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms["dice"].double(), dice, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_ignored_pixels_have_no_part(classes: int, activation: str) -> None:
    torch.manual_seed(0)
    mask = torch.randint(0, 2, (1, 6, 6))
    mask[:, 2:4] = 255
    logits = torch.randn(1, classes, 6, 6, requires_grad=True)
    other = logits.detach().clone()
    other[:, :, 2:4] = 100 * torch.randn(1, classes, 2, 6)
    terms, same = (segmentation_losses(x, mask, activation=activation) for x in (logits, other))
    assert terms == same
    sum(terms.values()).backward()
    assert (logits.grad[:, :, 2:4] == 0).all()
    assert (logits.grad[:, :, :2] != 0).any()


@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_everything_ignored_is_zero_with_a_gradient(classes: int, activation: str) -> None:
    logits = torch.randn(2, classes, 4, 4, requires_grad=True)
    terms = segmentation_losses(logits, torch.full((2, 4, 4), 255), activation=activation)
    assert all(term.item() == 0 for term in terms.values())
    sum(terms.values()).backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_perfect_prediction_costs_nothing() -> None:
    mask = torch.randint(0, 3, (1, 16, 16))
    logits = 40 * (torch.nn.functional.one_hot(mask, 3).permute(0, 3, 1, 2).float() - 0.5)
    assert all(term < 1e-3 for term in segmentation_losses(logits, mask).values())


def test_computed_in_float32_under_autocast() -> None:
    logits = (20 * torch.randn(2, 3, 8, 8)).bfloat16()
    mask = torch.randint(0, 3, (2, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        terms = segmentation_losses(logits, mask)
    expected = segmentation_losses(logits.float(), mask)
    assert terms == expected
    assert all(term.dtype == torch.float32 for term in terms.values())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_integer_dtypes(dtype: torch.dtype) -> None:
    logits, mask = torch.randn(1, 1, 4, 4), torch.randint(0, 2, (1, 4, 4))
    assert segmentation_losses(logits, mask.to(dtype)) == segmentation_losses(logits, mask)


def test_bad_masks_are_named() -> None:
    logits = torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"\(2, 1, 8, 8\): expected \(2, 8, 8\)"):
        segmentation_losses(logits, torch.zeros(2, 1, 8, 8, dtype=torch.long))
    with pytest.raises(TypeError, match="float32"):
        segmentation_losses(logits, torch.zeros(2, 8, 8))
    for value in (3, 254, -1):
        mask = torch.zeros(2, 8, 8, dtype=torch.long)
        mask[1, 2, 3] = value
        with pytest.raises(ValueError, match=f"holds the value {value}: expected class ids 0 to 2"):
            segmentation_losses(logits, mask)
    binary = torch.full((2, 8, 8), 2)
    with pytest.raises(ValueError, match="0 to 1"):
        segmentation_losses(logits[:, :1], binary)
