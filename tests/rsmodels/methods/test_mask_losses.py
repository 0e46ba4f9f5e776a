"""methods/mask_losses.py: transformers' criterion on the same points, formulas in float64, ranks."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from rsmodels.heads.mask2former import Mask2FormerHead, Mask2FormerOutput
from rsmodels.methods import mask_losses
from rsmodels.methods.mask_losses import (
    Costs,
    assign,
    draw_points,
    find_segments,
    mask2former_losses,
    matching_costs,
)

CLASSES = 5


def same_points_for_all(rows: int, *shape: int, device: Any = None) -> Tensor:
    """In the place of torch.rand(rows, count, 2): points that depend on their number alone."""
    if not shape:  # where points among ignored pixels move to
        return torch.full((rows,), 0.4)
    points = torch.empty(shape).uniform_(generator=torch.Generator().manual_seed(shape[0]))
    return points.expand(rows, *shape).clone()


@pytest.fixture
def fixed_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", same_points_for_all)


def predictions(
    batch: int = 2, *, queries: int = 6, stages: int = 3, size: tuple = (6, 5), classes: int = CLASSES
) -> Mask2FormerOutput:
    generator = torch.Generator().manual_seed(3)

    def leaf(*shape: int) -> Tensor:
        return (2 * torch.randn(shape, generator=generator)).requires_grad_()

    return Mask2FormerOutput(
        [leaf(batch, queries, classes + 1) for _ in range(stages)],
        [leaf(batch, queries, *size) for _ in range(stages)],
    )


def blobs(batch: int = 2, size: tuple = (24, 20), classes: int = CLASSES) -> Tensor:
    coarse = torch.randint(0, classes, (batch, 1, 4, 5), generator=torch.Generator().manual_seed(4))
    return torch.nn.functional.interpolate(coarse.float(), size=size)[:, 0].long()


def losses(output: Mask2FormerOutput, mask: Tensor, **options: Any) -> dict[str, Tensor]:
    classes = output.classes[0].shape[-1] - 1
    return mask2former_losses(output, mask, **{"num_classes": classes, "points": 64, **options})


def gradients(output: Mask2FormerOutput, terms: dict[str, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(sum(terms.values()), [*output.classes, *output.masks]))


# ---------------------------------------------------------------- the public implementation, the formulas


@pytest.mark.parametrize("queries", [6, 3])
def test_equals_transformers(fixed_points: None, queries: int) -> None:
    # Here and not above: the ranks below import this file, and transformers takes seconds.
    from transformers import Mask2FormerConfig
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

    output, mask = predictions(queries=queries), blobs()
    mask[1] = mask[1].clamp(max=2)
    config = Mask2FormerConfig(num_labels=CLASSES, train_num_points=64)
    names = {"class": "loss_cross_entropy", "mask": "loss_mask", "dice": "loss_dice"}
    weights = {"class": config.class_weight, "mask": config.mask_weight, "dice": config.dice_weight}
    shown = [ids.unique() for ids in mask]
    theirs = Mask2FormerLoss(config, {})(
        output.masks[-1],
        output.classes[-1],
        [(ids == present[:, None, None]).float() for ids, present in zip(mask, shown, strict=True)],
        shown,
        [
            {"masks_queries_logits": m, "class_queries_logits": c}
            for c, m in zip(output.classes[:-1], output.masks[:-1], strict=True)
        ],
    )
    expected = {
        key: weights[key] * sum(value for full, value in theirs.items() if full.startswith(name))
        for key, name in names.items()
    }
    found = losses(output, mask)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
    for ours, other in zip(gradients(output, found), gradients(output, expected), strict=True):
        assert other.abs().sum() > 0
        torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("rows, columns", [(5, 3), (3, 5), (4, 4), (6, 1)])
def test_assignment_equals_brute_force(rows: int, columns: int) -> None:
    costs = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    few, many = min(rows, columns), max(rows, columns)
    wide = costs if columns >= rows else costs.T
    best = min(
        sum(wide[i, j].item() for i, j in enumerate(chosen))
        for chosen in itertools.permutations(range(many), few)
    )
    queries, segments = assign(costs)
    assert len(set(queries.tolist())) == len(set(segments.tolist())) == few
    assert costs[queries, segments].sum().item() == pytest.approx(best)


def test_assignment_of_costs_that_are_no_numbers() -> None:
    costs = torch.tensor([[torch.nan, 1.0], [2.0, torch.inf], [0.5, 0.0]])
    assert [indices.tolist() for indices in assign(costs)] == [[0, 2], [1, 0]]
    assert len(assign(torch.full((3, 2), torch.nan))[0]) == 2


def test_matching_costs_are_the_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    class_logits, mask_logits, labels = (
        torch.randn(*s, generator=generator) for s in ((4, 6), (4, 9), (3, 9))
    )
    labels, classes = labels.sigmoid(), torch.tensor([4, 0, 2])
    found = matching_costs(class_logits, 4 * mask_logits, classes, labels, Costs(2.0, 5.0, 3.0))
    x, t = 4 * mask_logits.double(), labels.double()
    for q, m in itertools.product(range(4), range(3)):
        p = x[q].sigmoid()
        bce = -(t[m] * p.log() + (1 - t[m]) * (1 - p).log()).mean()
        dice = 1 - (2 * (p * t[m]).sum() + 1) / (p.sum() + t[m].sum() + 1)
        expected = -2 * class_logits[q].double().softmax(0)[classes[m]] + 5 * bce + 3 * dice
        torch.testing.assert_close(found[q, m].double(), expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- ignored pixels


def test_points_are_uniform_over_what_is_not_ignored() -> None:
    torch.manual_seed(0)
    mask = torch.zeros(2, 4, 6, dtype=torch.long)
    mask[1, 1:, 1:] = 255
    targets = find_segments(mask, CLASSES, 255)
    points = draw_points(targets, torch.tensor([1, 0, 1]), 8000)
    assert points.min() >= 0 and points.max() <= 1
    pixels = (points[..., 1] * 4).long() * 6 + (points[..., 0] * 6).long()
    for row, image in enumerate((1, 0, 1)):
        share = pixels[row].bincount(minlength=24) / 8000
        kept = (mask[image] != 255).flatten()
        assert not share[~kept].any()
        wanted = torch.full((int(kept.sum()),), 1 / kept.sum().item())
        torch.testing.assert_close(share[kept], wanted, rtol=0.25, atol=0)
    inside = points * torch.tensor([6.0, 4.0]) % 1  # also within a pixel
    assert (inside.mean((0, 1)) - 0.5).abs().max() < 0.02 and (
        inside.std((0, 1)) - 12**-0.5
    ).abs().max() < 0.01


def test_labels_interpolate_between_what_is_not_ignored() -> None:
    torch.manual_seed(0)
    mask = torch.randint(0, 3, (2, 5, 7))
    mask[0, 1:3, 2:5] = 255
    targets = find_segments(mask, CLASSES, 255)
    images, classes = torch.tensor([0, 1, 0]), torch.tensor([0, 1, 2])
    points = draw_points(targets, images, 50)
    found = mask_losses._labels(mask_losses._neighbours(targets, images, points), classes)
    for n, p in itertools.product(range(3), range(50)):
        ids = mask[images[n]]
        x, y = (points[n, p].double() * torch.tensor([7.0, 5.0]) - 0.5).tolist()
        hit = kept = inside = 0.0
        for row, column in itertools.product(range(5), range(7)):
            share = max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))
            inside += share
            kept += share * (ids[row, column] != 255).item()
            hit += share * (ids[row, column] == classes[n]).item()
        assert found[n, p].item() == pytest.approx(hit / kept * inside, abs=1e-5)


def test_ignored_pixels_have_no_part() -> None:
    output, mask = predictions(size=(24, 20)), blobs()
    mask[:, :, 10:] = 255
    other = Mask2FormerOutput(
        output.classes,
        [torch.where(torch.arange(20) > 10, 50 * torch.randn(m.shape), m) for m in output.masks],
    )
    torch.manual_seed(0)
    terms = losses(output, mask)
    torch.manual_seed(0)
    assert terms == losses(other, mask)
    for gradient in gradients(output, terms)[len(output.classes) :]:
        assert not gradient[..., 11:].any() and gradient[..., :10].any()


def test_an_image_of_ignored_pixels_counts_for_nothing(fixed_points: None) -> None:
    output, mask = predictions(), blobs()
    mask[0, :7] = 255
    mask[1] = 255
    alone = Mask2FormerOutput([x[:1] for x in output.classes], [x[:1] for x in output.masks])
    found, expected = losses(output, mask), losses(alone, mask[:1])
    for key in expected:
        torch.testing.assert_close(found[key], expected[key])
    for gradient in gradients(output, found):
        assert gradient[0].any() and not gradient[1].any()


def test_nothing_to_learn_still_has_a_gradient() -> None:
    head = Mask2FormerHead((4, 4, 4, 4), 3, num_queries=4, dim=32, encoder_layers=1, decoder_layers=2)
    features = [torch.randn(2, 4, side, side) for side in (8, 4, 2, 1)]
    terms = losses(head(features), torch.full((2, 16, 16), 255))
    assert {key: value.item() for key, value in terms.items()} == {"class": 0, "mask": 0, "dice": 0}
    sum(terms.values()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


# ---------------------------------------------------------------- numbers of segments, dtypes, input


@pytest.mark.parametrize("classes", [1, 255])
def test_one_class_and_more_classes_than_queries(classes: int) -> None:
    output = predictions(queries=20, classes=255)
    mask = torch.stack([torch.arange(256).view(16, 16).clamp(max=255)] * 2)
    mask[1] = 255  # beside 255 segments an image with none
    if classes == 1:
        mask[0] = 7
    terms = losses(output, mask)
    assert all(torch.isfinite(value) and value > 0 for value in terms.values())
    learning = gradients(output, terms)[-1][0].flatten(1).any(1).sum()
    assert learning == min(classes, 20)


def test_low_precision_is_widened(fixed_points: None) -> None:
    output, mask = predictions(), blobs()
    half = Mask2FormerOutput(*([x.detach().bfloat16().requires_grad_() for x in part] for part in output))
    rounded = Mask2FormerOutput(*([x.detach().float().requires_grad_() for x in part] for part in half))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = losses(half, mask)
    expected = losses(rounded, mask)
    for key, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[key])
    for low, high in zip(gradients(half, found), gradients(rounded, expected), strict=True):
        torch.testing.assert_close(low.float(), high, rtol=0.02, atol=1e-5)


def test_numbers_that_overflow_do_not_stop_the_matching() -> None:
    output = predictions()
    with torch.no_grad():
        output.masks[0][0, 0] = torch.inf
        output.classes[1][0, 0] = torch.nan
    terms = losses(output, blobs())  # the trainer says which step and which images it was
    assert terms.keys() == {"class", "mask", "dice"} and not torch.isfinite(sum(terms.values()))


@pytest.mark.parametrize(
    "mask, options, expected",
    [
        (torch.zeros(3, 8, 8, dtype=torch.long), {}, r"\(3, 8, 8\): expected \(2, H, W\)"),
        (torch.full((2, 8, 8), 5), {}, "the value 5: expected class ids 0 to 4"),
        (torch.zeros(2, 8, 8, dtype=torch.long), {"num_classes": 4}, "head for 5 classes, num_classes=4"),
        (torch.zeros(2, 8, 8, dtype=torch.long), {"points": 0}, "points=0"),
        (torch.zeros(2, 8, 8, dtype=torch.long), {"importance": 1.5}, "importance=1.5"),
    ],
)
def test_bad_input(mask: Tensor, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as error:
        losses(predictions(), mask, **options)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- ranks


def four_images() -> Tensor:
    """Masks whose halves show other classes: 0 to 4 and one with part ignored; class 3 alone and nothing."""
    mask = blobs(4)
    mask[1, 12:] = 255
    mask[2], mask[3] = 3, 255
    return mask


def one_of_two_ranks(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.rand = same_points_for_all  # type: ignore[assignment]
    output = predictions(4)
    half = slice(2 * rank, 2 * rank + 2)
    terms = losses(Mask2FormerOutput(*([x[half] for x in part] for part in output)), four_images()[half])
    everything = [*terms.values(), *gradients(output, terms)]
    for value in everything:
        dist.all_reduce(value)
    with torch.no_grad():  # no agreement: another rank may be done with its batches
        if rank == 0:
            losses(output, four_images())
    if rank == 0:
        torch.save([(value / 2).detach() for value in everything], f"{folder}/mean.pt")
    dist.destroy_process_group()


def test_ranks_average_to_one_process(tmp_path: Path, fixed_points: None) -> None:
    mp.spawn(one_of_two_ranks, args=(str(tmp_path),), nprocs=2)
    output = predictions(4)
    terms = losses(output, four_images())
    expected = [*terms.values(), *gradients(output, terms)]
    for found, wanted in zip(torch.load(tmp_path / "mean.pt"), expected, strict=True):
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-5, atol=1e-6)
