"""Pretraining: what is seen and what is left out, the two objectives, resuming, and who reads the result."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rsmodels
from rsmodels.cli import main
from rsmodels.data import Domain
from rsmodels.data.synthetic.gaps import SOURCE, TARGETS, left_out
from rsmodels.data.synthetic.scene import render_scene
from rsmodels.pretraining import pretrain as pretraining
from rsmodels.pretraining import probe, scenes
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
from rsmodels.pretraining.pretrain import build_encoder, pretrain
from rsmodels.pretraining.scenes import Crops, SceneStream, Views, places
from rsmodels.registry import ENCODERS
from rsmodels.weights import read_state

SIZES = {"dinov2_vit_tiny": 56, "sam_vit_tiny": 64}


def small(output: Path, **options: Any) -> PretrainConfig:
    defaults: dict[str, Any] = {
        "model": "dinov2_vit_tiny",
        "steps": 5,
        "batch_size": 4,
        "num_workers": 0,
        "device": "cpu",
        "log_every": 1,
        "probe": False,
    }
    options = {**defaults, **options}
    return PretrainConfig(str(output), image_size=SIZES[options["model"]], **options)


def make_crops(choice: Any = None, **options: Any) -> Crops:
    defaults = {"batch_size": 4, "views": 2, "seed": 1, "first_step": 0, "steps": 20, "workers": 0}
    return Crops(choice or places(left_out()), (32, 32), 8, **{**defaults, **options})


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def a_short_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few scenes, so that the window slides within a test."""
    monkeypatch.setattr(scenes, "WINDOW_SCENES", 6)
    monkeypatch.setattr(scenes, "FIRST_SCENES", 3)


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


@pytest.mark.parametrize("model", SIZES)
def test_filling_in_gets_better(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain(
        small(tmp_path / "x.safetensors", model=model, objective="mim", steps=24, batch_size=8, log_every=6)
    )
    lines = [line for line in capsys.readouterr().err.splitlines() if "loss" in line]
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines]
    assert len(losses) == 4 and losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("model", SIZES)
def test_unit_scale_changes_the_scale_alone(model: str) -> None:
    size = SIZES[model]
    encoder = build_encoder(PretrainConfig("x", model=model, image_size=size)).eval().double()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)  # no bias or scale stays at its start
        images = torch.randn(3, 3, size, size).double() * 0.3
        before = encoder.forward_intermediates(images, range(4))
        pretraining.to_unit_scale(encoder, images)
        after = encoder.forward_intermediates(images, range(4))
    assert torch.cat(after).square().mean().item() == pytest.approx(1, rel=1e-4)
    factor = after[0].norm() / before[0].norm()
    assert not 0.8 < factor < 1.2
    for small, large in zip(after, before, strict=True):
        assert (small - large * factor).norm() < 0.01 * small.norm()  # norms have an epsilon


# --------------------------------------------------------------------------------------- runs and their files


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Ctrl-C while step number `steps` runs."""
    step = pretraining.Run.step

    def stopped(self: pretraining.Run, number: int, views: Views) -> Tensor:
        if number == steps - 1:
            signal.raise_signal(signal.SIGINT)
        return step(self, number, views)

    monkeypatch.setattr(pretraining.Run, "step", stopped)


@pytest.mark.parametrize("objective", ["contrast", "mim", "distill"])
def test_a_stopped_run_ends_with_the_same_bits(
    objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(small(tmp_path / "whole.safetensors", objective=objective))
    output = tmp_path / "stopped.safetensors"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 3)
        pretrain(small(output, objective=objective, resume="auto"))
    state = tmp_path / "stopped.resume.safetensors"
    assert state.is_file() and not output.exists()
    assert "stopped after step 3 of 5" in capsys.readouterr().err
    assert pretrain(small(output, objective=objective, resume="auto")).steps == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stopped.safetensors", "whole.safetensors"]
    whole, resumed = read_state(tmp_path / "whole.safetensors"), read_state(output)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    # And what is done is done.
    assert pretrain(small(output, objective=objective, resume="auto")).steps == 0


def test_another_seed_is_another_encoder(tmp_path: Path) -> None:
    states = []
    for seed in (0, 1):
        pretrain(small(tmp_path / f"{seed}.safetensors", seed=seed, steps=1))
        states.append(read_state(tmp_path / f"{seed}.safetensors"))
    assert not torch.equal(states[0]["pos_embed"], states[1]["pos_embed"])


def test_dinov2_reads_it_without_a_mismatch(tmp_path: Path) -> None:
    output = tmp_path / "dinov2.safetensors"
    pretrain(small(output, steps=2))
    encoder: Any = ENCODERS["dinov2_vit_tiny"](image_size=56)
    report = encoder.load_pretrained(str(output))
    assert not report.initialised and not report.dropped and not report.resized
    state = read_state(output)
    assert all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items())
    larger = rsmodels.create_backbone(
        "dinov2_vit_tiny", out_indices=(0, 3), image_size=140, pretrained=str(output)
    )
    assert torch.equal(larger.encoder.blocks[3].ls2.gamma, state["blocks.3.ls2.gamma"])


def test_rs_sam_reads_it_without_a_mismatch(tmp_path: Path) -> None:
    output = tmp_path / "sam.safetensors"
    pretrain(small(output, model="sam_vit_tiny", steps=2))
    state = read_state(output)
    model = rsmodels.create_model("rs_sam_tiny", num_classes=2, image_size=64, pretrained=str(output))
    own = model.encoder.state_dict()
    for key, value in state.items():
        # LoRA keeps a frozen weight under the same name.
        assert torch.equal(own[key], value), key
    assert {key for key in own if key not in state} == {key for key in own if ".lora_" in key}
    assert len(model.base_weights) == 64
    backbone: Any = ENCODERS["sam_vit_tiny"](image_size=128)
    report = backbone.load_pretrained(str(output))
    assert not report.dropped and all(key.startswith("neck.") for key in report.initialised)


def test_the_command_pretrains_probes_and_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pretraining, "linear_probe", lambda encoder: probe.linear_probe(encoder, tiles=2))
    monkeypatch.setattr(probe, "ITERATIONS", 3)
    words = f"pretrain --output {tmp_path / 'new' / 'x.safetensors'} --minutes 0.003 --image-size 56"
    assert main([*words.split(), "--batch-size", "2", "--num-workers", "0", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    (said,) = [line for line in err.splitlines() if "steps fit into 0.003 minutes; --steps" in line]
    steps = int(said.split("--steps ")[1].split()[0])
    assert f"pretrain: {steps}/{steps}: loss" in err
    rows = [line.split() for line in out.splitlines()]
    assert rows[0][-2:] == ["random", "pretrained"] and rows[-1] == [str(tmp_path / "new" / "x.safetensors")]
    assert [row[0] for row in rows[1:7]] == ["source", *TARGETS] and rows[7][3] == "targets"
    assert all(0 <= float(row[-1]) <= 100 for row in rows[1:8])


def test_ctrl_c_is_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_after(monkeypatch, 1)
    words = (
        f"pretrain --output {tmp_path}/x.safetensors --steps 3 --image-size 56 --batch-size 2 --num-workers 0"
    )
    assert main(words.split()) == 130
    assert (tmp_path / "x.resume.safetensors").is_file()
    assert capsys.readouterr().err.endswith("rsmodels: interrupted\n")
    for more, message in (
        ("", "a run was stopped here"),
        (" --resume auto --lr 1", "it was written with lr 0.002, this run has 1.0; resume with the options"),
        (" --resume auto --objective mim", "it was written with objective contrast, this run has mim"),
        (" --resume auto --steps 4", "it was written with steps 3, this run has 4"),
    ):
        assert main((words + more).split()) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "x.resume.safetensors").write_bytes(b"damaged")
    assert main([*words.split(), "--resume", "auto"]) == 2
    assert "x.resume.safetensors: not readable as weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--output x.pth", "--output x.pth: expected a file name that ends in .safetensors"),
        ("--output there.safetensors", "--output there.safetensors: already exists"),
        ("--model vit_b", "--model 'vit_b': no such encoder; choose one of dinov2_vit_b"),
        ("--steps 0", "--steps must be above 0, not 0"),
        ("--seed -1", "--seed must be 0 or more, not -1"),
        ("--steps 3 --minutes 1", "--steps 3 and --minutes 1 both set the length; give one"),
        (
            "--objective distill --batch-size 1",
            "--batch-size 1: --objective distill compares the crops of a batch",
        ),
        (
            "--image-size 60",
            "image_size=60: expected one size or (H, W), in pixels, each a positive multiple of 14",
        ),
        ("--image-size 28", "--image-size 28: too small to learn from patches of 14 pixels; give at least"),
        ("--leave-out climate=martian", "domain climate='martian' is unknown"),
        ("--leave-out bands=rgb,bands=irrg", "each at most once"),
        ("--data folder", "--data: expected synthetic, found folder"),
        ("--resume here", "--resume: expected auto, found here"),
    ],
)
def test_bad_usage_is_one_line_and_2(
    words: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.safetensors").touch()
    base = [] if "--output" in words else ["--output", "x.safetensors"]
    base += [] if "--steps" in words else ["--steps", "1"]
    assert main(["pretrain", *base, *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("rsmodels: error: ") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "x.safetensors").exists()


def test_nothing_left_to_learn_from() -> None:
    with pytest.raises(ValueError, match="--leave-out leaves no domain to learn from"):
        places(left_out(["bands=rgb", "bands=irrg"]))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining.Run, "step", lambda *_: torch.tensor(math.nan))
    with pytest.raises(ValueError, match="step 1: the loss is nan; no state was written yet; a lower --lr"):
        pretrain(small(tmp_path / "x.safetensors"))
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------- the probe


def test_the_probe_finds_what_is_linear() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (4, 6, 6), generator=generator)
    features = torch.nn.functional.one_hot(labels, 3).float() + 0.1 * torch.randn(
        4, 6, 6, 3, generator=generator
    )
    weight = probe.fit(features, labels, 3)
    assert probe.logits_of(features, weight, (6, 6)).argmax(1).eq(labels).all()
    ignored = torch.full_like(labels, 255)
    ignored[0] = labels[0]  # what is ignored teaches nothing
    assert torch.equal(probe.fit(features, ignored, 3), probe.fit(features[:1], labels[:1], 3))


def test_the_probe_is_repeatable_and_names_every_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "ITERATIONS", 3)
    encoder = build_encoder(PretrainConfig("x", image_size=56)).eval()
    figures = probe.linear_probe(encoder, tiles=3)
    assert list(figures) == ["source", *TARGETS] and all(0 < value < 1 for value in figures.values())
    assert probe.linear_probe(encoder, tiles=3) == figures
    assert probe.mean_of_targets(figures) == pytest.approx(sum(list(figures.values())[1:]) / 5)
