"""Pretraining's views and objectives: what is seen, what is left out, what is learned from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rsmodels.data import Domain
from rsmodels.data.synthetic.gaps import SOURCE, TARGETS, left_out
from rsmodels.data.synthetic.scene import render_scene
from rsmodels.pretraining import scenes
from rsmodels.pretraining.config import PretrainConfig
from rsmodels.pretraining.objectives import (
    MASKED,
    TEMPERATURE,
    Contrast,
    Distillation,
    Hide,
    MaskedImages,
    draw_masks,
    overlap,
)
from rsmodels.pretraining.pretrain import build_encoder
from rsmodels.pretraining.scenes import Crops, SceneStream, Views, places
from rsmodels.registry import ENCODERS


def make_crops(choice: Any = None, **options: Any) -> Crops:
    defaults = {"batch_size": 4, "views": 2, "seed": 1, "first_step": 0, "steps": 20, "workers": 0}
    return Crops(choice or places(left_out()), (32, 32), 8, **{**defaults, **options})


# ------------------------------------------------------------------------------------ what is seen, and how


def test_five_gaps_start_from_the_source_and_change_what_they_name() -> None:
    assert len(TARGETS) == 5
    for name, target in TARGETS.items():
        changed = [
            key
            for key in ("region", "bands", "platform", "climate")
            if vars(target)[key] != vars(SOURCE)[key]
        ]
        assert changed == name.split("+")


def test_no_target_is_ever_drawn() -> None:
    seen = {
        Domain(domain.region, bands, domain.platform, domain.climate)
        for domain, kept in places(left_out())
        for bands in kept
    }
    assert not seen & set(TARGETS.values())
    assert len(seen) == 4 * 2 * 3 * 4 - len(TARGETS)  # and nothing else is missing
    strict = places(left_out(["region=coast", "bands=irrg", "platform=satellite", "climate=arid"]))
    assert len(strict) == 3 * 2 * 3
    for domain, kept in strict:
        assert kept == ("rgb",) and "coast" not in str(domain) and "arid" not in str(domain)


def test_a_pattern_names_a_domain_in_part() -> None:
    more = left_out(["region=delta, climate=boreal".replace(" ", "")]) - left_out()
    assert len(more) == 9 and all(d.region == "delta" and d.climate == "boreal" for d in more)


def test_crops_depend_on_seed_and_step_alone() -> None:
    whole = list(make_crops())
    assert all(view.shape == (4, 3, 32, 32) for views in whole for view in views.images)
    for first_step in (1, 13):  # the window grows, and slides
        for views, again in zip(
            whole[first_step:], make_crops(first_step=first_step, workers=1), strict=True
        ):
            assert all(map(torch.equal, views.images, again.images)) and views.corners == again.corners
    other = next(iter(make_crops(seed=2)))
    assert not torch.equal(other.images[0], whole[0].images[0])


def shown_by_both(views: Views) -> list[Tensor]:
    """The pixels (B, h, w, 3) that both views show, by their corners on the grid of 8 pixels."""
    return overlap(
        [image.permute(0, 2, 3, 1) for image in views.images], [(8 * y, 8 * x) for y, x in views.corners]
    )


def test_views_show_the_same_place_in_other_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    rgb_only = places(left_out(["bands=irrg"]))
    one_climate = places(left_out(["bands=irrg", "climate=arid", "climate=boreal", "climate=tropical"]))
    seen, other = shown_by_both(next(iter(make_crops(one_climate))))
    assert not torch.equal(seen, other)
    for name in ("GAIN", "CONTRAST", "BRIGHTNESS", "BLURRED", "NOISE"):
        monkeypatch.setattr(scenes, name, 0.0)
    batches = list(make_crops(one_climate, steps=6))
    for views in batches:
        seen, other = shown_by_both(views)
        torch.testing.assert_close(seen, other)
    assert len({tuple(map(tuple, views.corners)) for views in batches}) > 3
    seen, other = shown_by_both(next(iter(make_crops(rgb_only))))
    assert not torch.allclose(seen, other)  # in other climates
    both = places(left_out(["climate=arid", "climate=boreal", "climate=tropical"]))
    pairs = [shown_by_both(next(iter(make_crops(both, seed=seed)))) for seed in range(3)]
    differing = [not torch.allclose(a, b) for seen, other in pairs for a, b in zip(seen, other, strict=True)]
    assert any(differing) and not all(differing)  # rgb against irrg, in about half


def test_a_scene_is_one_layout_in_two_climates() -> None:
    choice = places(left_out())
    stream = SceneStream(3, 64, choice, looks=2)
    for index in range(6):
        looks, images = stream[index]
        first, second = (choice[look][0] for look in looks)
        assert first.climate != second.climate
        assert (first.region, first.platform) == (second.region, second.platform)
        for domain, image in zip((first, second), images.numpy(), strict=True):
            assert np.array_equal(image, render_scene((3, scenes.SPLIT, index), 64, domain).image)
    alone = places(left_out(["climate=arid", "climate=boreal", "climate=tropical"]))
    looks, images = SceneStream(3, 64, alone, looks=2)[0]
    assert looks[0] == looks[1] and torch.equal(images[0], images[1])
    assert torch.equal(SceneStream(3, 64, choice, looks=1)[2][1][0], stream[2][1][0])


# ------------------------------------------------------------------------------------------ what is learned


def test_masks_hide_their_share_in_blocks() -> None:
    mask = draw_masks(16, (8, 10), torch.Generator().manual_seed(0))
    assert mask.shape == (16, 8, 10)
    blocks = mask.unflatten(2, (5, 2)).unflatten(1, (4, 2)).permute(0, 1, 3, 2, 4).flatten(3)
    assert torch.equal(blocks.any(-1), blocks.all(-1))
    assert blocks.all(-1).sum((1, 2)).tolist() == [round(MASKED * 20)] * 16
    assert len(torch.unique(mask.flatten(1), dim=0)) > 10
    assert draw_masks(2, (5, 3), torch.Generator()).shape == (2, 5, 3)


def test_hidden_pixels_reach_nothing_but_the_target() -> None:
    encoder = ENCODERS["dinov2_vit_tiny"](image_size=56)
    hide = Hide(encoder)
    torch.nn.init.normal_(hide.patch)
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 1, 2] = True
    images = torch.randn(1, 3, 56, 56)
    changed = images.clone()
    changed[:, :, 14:28, 28:42] += 1
    assert torch.equal(hide(images, mask), hide(changed, mask))
    shown = hide(images, mask)
    assert torch.equal(shown[0, :, 14:28, 28:42], hide.patch)
    shown[:, :, 14:28, 28:42] = images[:, :, 14:28, 28:42]
    assert torch.equal(shown, images)


def test_masked_images_predicts_the_hidden_patches_normalised() -> None:
    torch.manual_seed(0)
    objective = MaskedImages(ENCODERS["dinov2_vit_tiny"](image_size=56))
    images = torch.randn(2, 3, 56, 56) * 3 + 5
    targets = objective.targets(images)
    patch = images[1, :, 28:42, 42:56]
    expected = (patch - patch.mean()) / patch.var().add(0.01).sqrt()
    torch.testing.assert_close(targets[1, 2, 3], expected.flatten())
    mask = draw_masks(2, (4, 4), torch.Generator().manual_seed(0))
    torch.nn.init.zeros_(objective.head.weight)
    torch.nn.init.zeros_(objective.head.bias)
    views = Views([images], [(0, 0)])
    torch.testing.assert_close(objective(views, mask), targets[mask].square().mean())


def test_overlap_is_the_same_ground() -> None:
    ground = torch.arange(9 * 9).view(1, 9, 9, 1)
    corners = [(2, 0), (0, 1), (1, 1)]
    maps = [ground[:, y : y + 6, x : x + 7] for y, x in corners]
    assert all(torch.equal(part, ground[:, 2:6, 1:7]) for part in overlap(maps, corners))


def test_contrast_tells_the_same_ground_among_all_patches() -> None:
    torch.manual_seed(0)
    objective = Contrast(build_encoder(PretrainConfig("x", image_size=56)))
    images = [torch.randn(3, 3, 56, 56) for _ in range(2)]
    corners = [(1, 0), (0, 2)]
    expected = []
    for block, head in enumerate(objective.heads):
        maps = [objective.encoder.forward_intermediates(image, [block])[0] for image in images]
        vectors = []
        for tokens, rows, columns in zip(maps, ((0, 3), (1, 4)), ((2, 4), (0, 2)), strict=True):
            part = tokens[:, :, slice(*rows), slice(*columns)].permute(0, 2, 3, 1).flatten(0, 2)
            part = F.layer_norm(part, part.shape[1:])
            vectors.append(head(part).double())
        first, second = (vector / vector.norm(dim=1, keepdim=True) for vector in vectors)
        scores = (first @ second.T / TEMPERATURE).exp()
        for axis in (0, 1):
            expected.append(-(scores.diagonal() / scores.sum(axis)).log().mean())
    mask = torch.zeros(3, 4, 4, dtype=torch.bool)
    loss = objective(Views(images, corners), mask)
    torch.testing.assert_close(loss.double(), torch.stack(expected).mean(), atol=1e-5, rtol=1e-5)
    loss.backward()
    unused = [name for name, p in objective.named_parameters() if p.grad is None]
    assert all(name.startswith("encoder.norm.") for name in unused), unused


def test_the_average_follows_without_a_gradient() -> None:
    torch.manual_seed(0)
    objective = Distillation(build_encoder(PretrainConfig("x", image_size=56)))
    views = [torch.randn(4, 3, 56, 56) for _ in range(2)]
    targets = objective.targets(views[1])
    torch.testing.assert_close(targets.mean(0), torch.zeros_like(targets[0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(targets.square().mean((0, 1, 2)), torch.ones(128), atol=1e-3, rtol=0)
    corners = [(0, 1), (2, 0)]
    objective(Views(views, corners), draw_masks(4, (4, 4), torch.Generator().manual_seed(0))).backward()
    assert all(p.grad is None for p in objective.average.parameters())
    before = objective.average.patch_embed.proj.bias.clone()
    with torch.no_grad():
        objective.encoder.patch_embed.proj.bias += 1
    objective.after_step(0.0)
    torch.testing.assert_close(objective.average.patch_embed.proj.bias, before + 0.01)
    assert objective.learned() is objective.average


def test_layer_scale_starts_where_minutes_can_move_it() -> None:
    encoder = build_encoder(PretrainConfig("x"))
    assert encoder.blocks[0].ls1.gamma.eq(1).all() and encoder.blocks[3].ls2.gamma.eq(1).all()
