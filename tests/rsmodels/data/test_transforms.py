"""Transforms: pure functions of batch and generator, image and mask always move together."""

from __future__ import annotations

import pytest
import torch

from rsmodels.data.schema import IGNORE
from rsmodels.data.transforms import (
    collate,
    fit_to_size,
    largest_class_share,
    photometric,
    random_crop,
    random_flip,
    random_scale,
    resize,
    resize_image,
    resize_mask,
)


def sample(height: int, width: int, name: str = "a", channels: int = 3) -> dict:
    """Every pixel's value names its place, in the image and in the mask alike."""
    places = torch.arange(height * width).reshape(height, width) % 250 + 1
    return {
        "image": places.float().expand(channels, -1, -1).clone(),
        "mask": places.clone(),
        "name": name,
        "domain": "d",
    }


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def aligned(batch: dict) -> bool:
    image, mask = batch["image"], batch["mask"]
    padding = mask == IGNORE
    return bool(((image[:, 0] == mask) | padding).all() and (image[:, 0][padding] == 0).all())


def test_collate_stacks_equal_tiles_and_keeps_others_apart():
    batch = collate([sample(4, 6, "a"), sample(4, 6, "b")])
    assert batch["image"].shape == (2, 3, 4, 6)
    assert batch["name"] == ["a", "b"]
    mixed = collate([sample(4, 6), sample(6, 4)])
    assert [mask.shape for mask in mixed["mask"]] == [(4, 6), (6, 4)]


def test_collate_names_the_tile_with_other_bands():
    with pytest.raises(ValueError, match="odd has 4 bands, a 3"):
        collate([sample(4, 4), sample(4, 4, "odd", channels=4)])
    with pytest.raises(ValueError, match="at least one"):
        collate([])


@pytest.mark.parametrize("shapes", [[(20, 30), (20, 30)], [(8, 40), (16, 16), (5, 5)]])
def test_a_random_crop_pads_with_ignore_and_never_shifts_the_mask(shapes):
    batch = random_crop(collate([sample(*shape) for shape in shapes]), 16, generator())
    assert batch["image"].shape == (len(shapes), 3, 16, 16)
    assert aligned(batch)
    missing = [16 * 16 - min(h, 16) * min(w, 16) for h, w in shapes]
    assert [(mask == IGNORE).sum().item() for mask in batch["mask"]] == missing


def test_random_crops_reach_every_corner():
    tile = collate([sample(6, 6)])
    corners = {random_crop(tile, 5, generator(seed))["mask"][0, 0, 0].item() for seed in range(60)}
    assert corners == {1, 2, 7, 8}


@pytest.mark.parametrize(
    "transform",
    [
        lambda batch, g: random_crop(batch, 8, g),
        lambda batch, g: random_crop(batch, 8, g, max_class_share=0.75),
        lambda batch, g: random_crop(random_scale(batch, 8, (0.5, 2.0), g), 8, g),
        lambda batch, g: random_flip(batch, g),
        lambda batch, g: photometric(batch, g),
    ],
)
def test_the_generator_decides_everything_and_the_input_is_left_alone(transform):
    batch = collate([sample(12, 12) for _ in range(4)])
    before = batch["image"].clone()
    torch.manual_seed(0)
    first = transform(batch, generator(3))
    torch.manual_seed(1)
    second = transform(batch, generator(3))
    assert torch.equal(first["image"], second["image"])
    assert torch.equal(first["mask"], second["mask"])
    assert torch.equal(batch["image"], before)
    others = [transform(batch, generator(seed))["image"] for seed in range(4, 12)]
    assert any(not torch.equal(first["image"], other) for other in others)


def test_scaling_keeps_image_and_mask_together():
    batch = collate([sample(30, 40) for _ in range(40)])
    out = random_scale(batch, 20, (0.5, 2.0), generator())
    shapes = [tuple(mask.shape) for mask in out["mask"]]
    assert [tuple(image.shape[1:]) for image in out["image"]] == shapes
    assert all(10 <= short <= 40 and abs(long - short * 4 / 3) <= 1 for short, long in shapes)
    shorts = sorted(short for short, _ in shapes)
    assert shorts[0] < 14 and shorts[-1] > 36 and sum(short < 25 for short in shorts) in range(11, 30)
    # What the mask says of a place is what the image shows there, up to interpolation.
    flat = sample(30, 40)
    flat["mask"] = (torch.arange(40).expand(30, 40) >= 20).long()
    flat["image"] = flat["mask"].float().expand(3, -1, -1) * 100
    for seed in range(4):
        out = random_scale(collate([flat]), 20, (0.5, 2.0), generator(seed))
        assert ((out["image"][0][0] > 50).long() == out["mask"][0]).float().mean() > 0.94
    cropped = random_crop(out, 24, generator())
    assert cropped["image"].shape == (1, 3, 24, 24)


def test_an_elongated_tile_is_not_blown_up():
    out = random_scale(collate([sample(4, 400)]), 20, (2.0, 2.0), generator())
    assert tuple(out["mask"][0].shape) == (1, 80)
    with pytest.raises(ValueError, match="not a number of pixels"):
        random_scale(collate([sample(4, 4)]), 0, (1.0, 1.0), generator())


def two_classes() -> dict:
    """Class 1 in the right fifth of the tile, class 0 elsewhere; a corner that is not labelled."""
    tile = sample(20, 40)
    tile["mask"] = (torch.arange(40).expand(20, 40) >= 32).long()
    tile["mask"][:4, :4] = IGNORE
    return tile


def test_crops_of_one_class_are_drawn_again():
    mixed = [0, 0]
    for seed in range(60):
        batch = collate([two_classes()])
        first = random_crop(batch, 10, generator(seed))["mask"]
        taken = random_crop(batch, 10, generator(seed), max_class_share=0.75)["mask"]
        for which, mask in enumerate((first, taken)):
            mixed[which] += largest_class_share(mask) <= 0.75
        if largest_class_share(first) <= 0.75:
            assert torch.equal(first, taken), "the first window that will do is taken"
    assert mixed[0] < 20 and mixed[1] > 35  # one window in six will do


def test_a_tile_of_one_class_is_cropped_all_the_same():
    tile = sample(20, 20)
    tile["mask"] = torch.zeros(20, 20, dtype=torch.long)
    empty = sample(20, 20)
    empty["mask"] = torch.full((20, 20), IGNORE)
    out = random_crop(collate([tile, empty]), 8, generator(), max_class_share=0.75)
    assert out["mask"].shape == (2, 8, 8)
    small = random_crop(collate([sample(6, 6)]), 8, generator(), max_class_share=0.01)
    assert (small["mask"] == IGNORE).sum() == 28


def test_later_numbers_do_not_depend_on_how_many_crops_were_looked_at():
    after = []
    for tile in (two_classes(), {**sample(20, 40), "mask": torch.zeros(20, 40, dtype=torch.long)}):
        own = generator(5)
        random_crop(collate([tile]), 10, own, max_class_share=0.75)
        after.append(torch.rand(1, generator=own))
    assert torch.equal(*after)


def test_the_share_of_the_largest_class_counts_labelled_pixels():
    mask = torch.tensor([[0, 0, 0, 2], [IGNORE, IGNORE, IGNORE, IGNORE]])
    assert largest_class_share(mask) == 0.75
    assert largest_class_share(torch.full((2, 2), IGNORE)) == 1


def test_flips_are_flips():
    batch = collate([sample(5, 7) for _ in range(64)])
    out = random_flip(batch, generator())
    assert aligned(out)
    mask = batch["mask"][0]
    kinds = [mask, mask.flip(-1), mask.flip(-2), mask.flip(-1).flip(-2)]
    counts = [sum(torch.equal(one, kind) for one in out["mask"]) for kind in kinds]
    assert sum(counts) == 64
    assert min(counts) >= 6
    assert torch.equal(random_flip(batch, generator(), horizontal=0, vertical=0)["mask"], batch["mask"])
    assert torch.equal(
        random_flip(batch, generator(), horizontal=1, vertical=0)["mask"], batch["mask"].flip(-1)
    )


def test_photometry_leaves_masks_and_empty_pixels_alone():
    batch = collate([sample(8, 8) for _ in range(32)])
    batch["image"] = batch["image"] * torch.tensor([1.0, 0.6, 0.3])[:, None, None]
    batch["mask"][:, 0, 0] = IGNORE
    batch["image"][:, :, 0, 0] = 0
    out = photometric(batch, generator())
    assert out["mask"] is batch["mask"]
    assert (out["image"][:, :, 0, 0] == 0).all()
    changed = ((out["image"] - batch["image"]).abs() > 0.01).flatten(1).any(1).float().mean()
    assert 0.6 < changed < 1  # one in eight tiles draws none of the three
    batch["mask"][0], batch["image"][0] = IGNORE, 0
    assert (photometric(batch, generator())["image"][0] == 0).all()


@pytest.mark.parametrize("scale", [1.0, 40.0, -1.0])
def test_photometry_does_the_same_to_any_range_of_values(scale):
    batch = collate([sample(8, 8, channels=5) for _ in range(8)])
    scaled = {**batch, "image": batch["image"] * scale}
    # A mirrored range gets the mirrored brightness, so only its size can be compared.
    options = {"brightness": 0.125 if scale > 0 else 0.0}
    first, second = photometric(batch, generator(), **options), photometric(scaled, generator(), **options)
    assert torch.allclose(first["image"] * scale, second["image"], rtol=1e-4, atol=1e-3 * abs(scale))
    assert not torch.allclose(first["image"], batch["image"], atol=1.0)


def test_each_part_of_photometry_does_what_its_name_says():
    batch = collate([sample(8, 8) for _ in range(32)])
    batch["image"] = batch["image"] * torch.tensor([1.0, 0.6, 0.3])[:, None, None]
    before = batch["image"]
    off = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0}
    assert torch.allclose(photometric(batch, generator(), **off)["image"], before, atol=1e-3)
    shift = photometric(batch, generator(), **{**off, "brightness": 0.1})["image"] - before
    assert torch.allclose(shift.amax((1, 2, 3)), shift.amin((1, 2, 3)), atol=1e-3)
    assert 0 < shift.abs().max() <= 0.1 * (before.max() - before.min()) + 1e-3
    means = photometric(batch, generator(), **{**off, "contrast": 0.5})["image"].mean((1, 2, 3))
    assert torch.allclose(means, before.mean((1, 2, 3)), atol=1e-2)
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    colourful = photometric(batch, generator(), **{**off, "saturation": 0.5})["image"]
    assert torch.allclose((colourful * luma).sum(1), (before * luma).sum(1), atol=1e-2)
    assert (colourful - before).abs().max() > 1


def test_fit_pads_small_tiles_and_takes_the_centre_of_large_ones():
    batch = fit_to_size(collate([sample(4, 4), sample(8, 6)]), 6)
    assert aligned(batch)
    assert (batch["mask"][0] == IGNORE).sum() == 36 - 16
    assert torch.equal(batch["mask"][1], sample(8, 6)["mask"][1:7])
    with pytest.raises(ValueError, match="not one of pad, resize"):
        fit_to_size(batch, 6, mode="crop")


def test_resize_makes_up_no_label_and_keeps_place():
    mask = torch.tensor([[0, 0, 3, 3], [0, 0, 3, 3], [IGNORE, IGNORE, 1, 1], [IGNORE, IGNORE, 1, 1]])
    assert resize_mask(mask, 2).tolist() == [[0, 3], [IGNORE, 1]]
    assert torch.equal(resize_mask(resize_mask(mask, 8), 4), mask)
    ramp = torch.arange(64.0).expand(1, 64, 64)
    small, large = resize_image(ramp, 32)[0, 0], resize_image(ramp, 128)[0, 0]
    assert torch.allclose(small[4:-4], torch.arange(32.0)[4:-4] * 2 + 0.5, atol=1e-3)  # pixel centres agree
    assert torch.allclose(large[4:-4], (torch.arange(128.0)[4:-4] - 0.5) / 2, atol=1e-3)


def test_resize_of_a_batch_of_several_sizes():
    batch = resize(collate([sample(4, 6), sample(12, 3)]), (6, 8))
    assert batch["image"].shape == (2, 3, 6, 8)
    assert batch["mask"].shape == (2, 6, 8)
    assert torch.equal(fit_to_size(batch, 4, "resize")["image"], resize(batch, 4)["image"])


def test_what_needs_one_size_says_so():
    mixed = collate([sample(4, 6), sample(6, 4)])
    for transform in (random_flip, photometric):
        with pytest.raises(ValueError, match="crop or fit them to one size first"):
            transform(mixed, generator())
    with pytest.raises(ValueError, match="not a number of pixels"):
        random_crop(mixed, 0, generator())
