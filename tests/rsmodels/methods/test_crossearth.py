"""methods/crossearth.py: eqs. (5), (6), (7) and (10), the flows, and the switches of Table 8."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rsmodels
from rsmodels.methods import masked_images
from rsmodels.methods.crossearth import CrossEarth
from rsmodels.methods.crossearth_models import TINY
from rsmodels.methods.mask_losses import mask2former_losses
from rsmodels.registry import ENCODERS, create_model
from rsmodels.style import StyleStatistics, draw_mask, synthetic_field

SIZE = 64
SWITCHES = ("rein", "gse", "mim", "style")
SEGMENTATION = {"class", "mask", "dice"}


def build(**options) -> CrossEarth:
    torch.manual_seed(0)
    return rsmodels.create_model("crossearth_tiny", num_classes=3, image_size=SIZE, **options).train()


def batch_for(size: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(size, 3, SIZE, SIZE, generator=generator)
    return {"image": image, "mask": torch.randint(0, 3, (size, SIZE, SIZE), generator=generator)}


def losses_of(model: CrossEarth, data: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(2)
    return model.losses(data)


def prepared(**options) -> CrossEarth:
    """Injectors, Rein and prompt with values that make them matter; every step draws styles."""
    model = build(style_probability=1.0, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".scale", ".prompt")):
                nn.init.normal_(parameter, std=0.3)
    return model


def _learns(parameter: Tensor) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())


@pytest.fixture
def remembered(monkeypatch: pytest.MonkeyPatch) -> Callable[[CrossEarth], dict[str, list]]:
    """Notes what the encoder, the decoder and the losses are called with."""

    def watch(model: CrossEarth) -> dict[str, list]:
        seen: dict[str, list] = {"encoder": [], "head": [], "restored": [], "styled": [], "masked": []}

        def spy(owner: object, name: str, note: Callable) -> None:
            original = getattr(owner, name)

            def call(*arguments, **keywords):
                result = original(*arguments, **keywords)
                note(arguments, result)
                return result

            monkeypatch.setattr(owner, name, call)

        spy(model.encoder, "forward_intermediates", lambda a, r: seen["encoder"].append((a[0], r)))
        spy(model.head, "forward", lambda a, r: seen["head"].append(a[0]))
        if model.mim is not None:
            spy(model.mim.decoder, "forward", lambda a, r: seen["restored"].append((a[0], r)))
            spy(model.mim, "masked", lambda a, r: seen["masked"].append(r))
        if model.style is not None:
            spy(model, "_styled", lambda a, r: seen["styled"].append(r))
        return seen

    return watch


@pytest.mark.parametrize("mim_loss", ("l1", "mse"))
@pytest.mark.parametrize("mim_target", ("image", "input"))
def test_the_terms_are_equation_10(remembered: Callable, mim_loss: str, mim_target: str) -> None:
    model = prepared(mim_loss=mim_loss, mim_target=mim_target)
    data = batch_for()
    seen = remembered(model)
    terms = losses_of(model, data)
    assert terms.keys() == SEGMENTATION | {"mim", "delta"}
    x_s, x_m = seen["styled"][0], seen["masked"][0].detach()
    assert len(seen["encoder"]) == len(seen["head"]) == len(seen["restored"]) == 1, "one pass for both flows"
    images = seen["encoder"][0][0]
    assert torch.equal(images[:2], x_s) and torch.equal(images[2:], x_m)

    distance = F.l1_loss if mim_loss == "l1" else F.mse_loss
    # Each flow by itself, each image through encoder and decoder alone.
    alone = [model.mim.decoder(model._encode(x[None])) for x in (*x_s, *x_m)]
    restored_s, restored_m = torch.cat(alone[:2]), torch.cat(alone[2:])
    target = data["image"] if mim_target == "image" else x_m
    expected = distance(restored_s, x_s) + distance(restored_m, target)
    torch.testing.assert_close(terms["mim"], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms["delta"], F.l1_loss(restored_s, restored_m), rtol=1e-4, atol=1e-6)

    output = model._segment(x_s, model._encode(x_s))
    with torch.no_grad():  # L_Seg takes its points behind the styles and masks: draw the same ones
        torch.manual_seed(2)
        model._styled(data["image"])
        model.mim.masked(data["image"])
        segmentation = mask2former_losses(output, data["mask"], num_classes=3, points=model.points)
    for name, value in segmentation.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-3), name


def test_without_a_style_the_image_itself_is_segmented(remembered: Callable) -> None:
    model = build(style_probability=0.0)
    seen = remembered(model)
    data = batch_for()
    terms = losses_of(model, data)
    assert terms["delta"] == 0 and terms["mim"] > 0
    images = seen["encoder"][0][0]
    assert torch.equal(images, torch.cat([data["image"], seen["masked"][0]]))
    stages, restored = seen["restored"][0]
    assert len(restored) == 2, "X is not restored"
    for stage, whole in zip(stages, seen["encoder"][0][1], strict=True):
        assert torch.equal(stage, whole[2:])


def test_styles_are_drawn_with_the_probability_of_appendix_b() -> None:
    model = build()
    torch.manual_seed(0)
    image = torch.zeros(1, 3, 4, 4)
    drawn = sum(model._styled(image) is not None for _ in range(2000))
    assert 150 < drawn < 250, "10 %"


def test_equation_5_in_the_normalisation_of_the_model() -> None:
    """X_S is X where the mask is 0; the styled part, as raw values, is one image in [0, 255]."""
    model = prepared(style_ratio=0.5)
    image = batch_for()["image"]
    torch.manual_seed(3)
    styled = model._styled(image)
    changed = ((styled - image).abs() > 1e-3).any(1)
    blocks = changed.unflatten(2, (4, 16)).unflatten(1, (4, 16)).float().mean((2, 4))
    assert 0.2 < changed.float().mean() < 0.8 and ((blocks < 0.01) | (blocks > 0.9)).all()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.preprocessing.mean, model.preprocessing.std))
    raw = (styled * std + mean)[changed[:, None].expand_as(styled)]
    assert raw.min() >= -1e-3 and raw.max() <= 255 + 1e-3


@pytest.mark.parametrize("prompt", ("fill", "multiply"))
def test_equation_6(prompt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(prompt=prompt, mask_ratio=0.6, mask_patch=8)
    image = batch_for()["image"]
    masks = []

    def noted(*arguments, **options) -> Tensor:
        masks.append(draw_mask(*arguments, **options))
        return masks[-1]

    monkeypatch.setattr(masked_images, "draw_mask", noted)
    empty = model.mim.masked(image)
    assert masks[0].shape == (2, 1, SIZE, SIZE) and not torch.equal(*masks[0])
    assert 0.25 < masks[0].mean() < 0.55, "a share of 1 - τ is kept"
    if prompt == "multiply":
        assert not empty.any(), "a prompt of zeros leaves nothing"
    else:
        assert torch.equal(empty, image * masks[0])
    nn.init.normal_(model.mim.prompt)
    found, v, m = model.mim.masked(image), model.mim.prompt, masks[1]
    torch.testing.assert_close(found, image * m * v if prompt == "multiply" else image * m + v * (1 - m))
    found.sum().backward()
    assert model.mim.prompt.grad.any()


def test_the_masked_flow_reaches_rein_and_nothing_of_the_segmentation() -> None:
    model = prepared()

    def reached(names: set[str]) -> set[str]:
        model.zero_grad()
        terms = losses_of(model, batch_for())
        sum(terms[name] for name in names).backward()
        return {n.partition(".")[0] for n, p in model.named_parameters() if _learns(p)}

    assert reached({"mim"}) == reached({"delta"}) == {"rein", "mim"}
    assert reached(SEGMENTATION) == {"rein", "gse", "injectors", "head"}


def test_injectors_change_what_the_decoder_sees_and_no_block() -> None:
    model = prepared()
    with torch.no_grad():
        image = batch_for()["image"]
        stages = model._encode(image)
        with_them = model.forward_features(image)
        for inject in model.injectors:
            inject.scale.zero_()
        without = model.forward_features(image)
        again = model._encode(image)
    assert all(torch.equal(a, b) for a, b in zip(stages, again, strict=True))
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(with_them, without, strict=True))
    for x, y in zip(stages, without, strict=True):
        torch.testing.assert_close(F.interpolate(x, size=y.shape[-2:], mode="bilinear"), y)


@pytest.mark.parametrize("off", SWITCHES)
def test_each_switch_leaves_its_part_out(off: str) -> None:
    model = build(**{off: False})
    data = batch_for()
    terms = losses_of(model, data)
    expected = SEGMENTATION | {"mim", "delta"}
    expected -= {"mim": {"mim", "delta"}, "style": {"delta"}}.get(off, set())
    assert terms.keys() == expected
    gone = {"rein": "rein.", "gse": ("gse.", "injectors."), "mim": "mim.", "style": "style."}[off]
    assert not [key for key in model.state_dict() if key.startswith(gone)]
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_all_switches_off_is_the_source_only_model() -> None:
    model = build(**dict.fromkeys(SWITCHES, False))
    assert losses_of(model, batch_for()).keys() == SEGMENTATION
    assert {key.partition(".")[0] for key in model.state_dict()} == {"encoder", "head"}


def test_evaluation_is_segmentation_alone_and_draws_nothing_but_points(remembered: Callable) -> None:
    model = prepared().eval()
    seen = remembered(model)
    data = batch_for()
    with torch.no_grad():
        terms, logits = model.losses_and_logits(data)
        assert terms.keys() == losses_of(model, data).keys() == SEGMENTATION
        torch.testing.assert_close(logits, model(data["image"]))
    assert not seen["styled"] and not seen["masked"] and not seen["restored"]


@torch.no_grad()
def test_examples_for_the_report() -> None:
    model = prepared().eval()
    x, x_s, x_m = model.style_examples(batch_for()["image"])
    assert all(
        0 <= part.min() <= part.max() <= 1 and part.shape == (2, 3, SIZE, SIZE) for part in (x, x_s, x_m)
    )
    assert not torch.equal(x, x_s) and not torch.equal(x, x_m)
    assert build(style=False).style_examples(batch_for()["image"]) is None


@pytest.mark.parametrize("variant, taps", [("b", (3, 5, 7, 11)), ("l", (7, 11, 15, 23))])
def test_rvsa_serves_as_backbone(variant: str, taps: tuple[int, ...]) -> None:
    """Table 10's taps; and a small one of its kind trains in both flows, its own weights frozen."""
    with torch.device("meta"):
        model = create_model(f"crossearth_rvsa_{variant}", num_classes=6)
    assert (model.taps, model.image_size, model.encoder.prefix_tokens) == (taps, (512, 512), 0)
    assert model.rein.token_a.shape[0] == len(model.encoder.blocks)
    if variant == "b":
        tiny = CrossEarth(ENCODERS["rvsa_vit_tiny"], num_classes=3, image_size=SIZE, **TINY).train()
        sum(losses_of(tiny, batch_for()).values()).backward()
        trained = {n.partition(".")[0] for n, p in tiny.named_parameters() if p.grad is not None}
        assert trained == {"rein", "gse", "injectors", "mim", "head"}


def test_the_linear_decoder_is_table_9s_other_row() -> None:
    terms = losses_of(build(mim_decoder="linear"), batch_for())
    assert terms["mim"] > 0


def test_statistics_are_kept_with_the_model_and_their_file_is_not_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shipped = synthetic_field()
    file = tmp_path / "field.json"
    StyleStatistics("color", shipped.mean + 0.01, 2 * shipped.covariance, source="elsewhere").save(file)
    capsys.readouterr()
    model = build(style_statistics=str(file))
    assert capsys.readouterr().err == ""
    torch.testing.assert_close(model.style.mean.double(), shipped.mean + 0.01)
    rsmodels.save_model(model, tmp_path / "best")
    file.unlink()
    loaded, info = rsmodels.load_model(tmp_path / "best")
    assert info["arguments"]["style_statistics"] == str(file)
    assert torch.equal(loaded.style.covariance, model.style.covariance)
    assert capsys.readouterr().err == ""
    build()
    assert capsys.readouterr().err.count("\n") == 1, "one line says whose styles these are"
    with pytest.raises(FileNotFoundError, match=r"field\.json"):
        build(style_statistics=str(file))


def test_a_prompt_of_another_size_is_resized(tmp_path: Path) -> None:
    model = prepared().eval()
    rsmodels.save_model(model, tmp_path / "best")
    larger, _ = rsmodels.load_model(tmp_path / "best", image_size=96)
    assert larger.mim.prompt.shape == (1, 3, 96, 96) and larger.mim.prompt.abs().max() > 0


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"mim_decoder": "unet"}, "mim_decoder='unet': expected one of aspp, linear"),
        ({"mim_loss": "l2"}, "mim_loss='l2': expected one of l1, mse"),
        ({"mim_target": "x"}, "mim_target='x'"),
        ({"prompt": "add"}, "prompt='add'"),
        ({"mask_ratio": 1.5}, "mask_ratio=1.5"),
        ({"style_probability": -0.1}, "style_probability=-0.1"),
        ({"style_mask": "half"}, "style_mask='half'"),
        ({"injector_heads": 3}, "3 heads"),
        ({"gse_width": 0}, "gse_width=0"),
        ({"style_mix": 2.0}, r"style_mix=2\.0"),
        ({"style_patch": 0}, "style_patch=0"),
        ({"style_covariance": "half"}, "style_covariance='half'"),
        ({"head_heads": 0}, "head_heads=0"),
        ({"head_dim": 30}, "head_dim=30 with head_heads=4: expected a multiple of 32"),
        ({"pixel_mlp_dim": -1}, "pixel_mlp_dim=-1"),
        ({"pixel_layers": 0}, "pixel_layers=0"),
        ({"decoder_layers": 0}, "decoder_layers=0"),
        ({"decoder_mlp_dim": 0}, "decoder_mlp_dim=0"),
        ({"rein": False, "num_queries": 0}, "num_queries=0"),
        ({"points": 0}, "points=0"),
        ({"image_size": 32, "style_model": "ghiasi"}, "image_size=32x32 with style_model='ghiasi'.*43x43"),
        ({"value_range": 0.0}, "value_range=0"),
        ({"style_model": "ghiasi"}, "style_model='ghiasi' with style_weights=None"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(options: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as error:
        create_model("crossearth_tiny", num_classes=3, **options)
    assert "\n" not in str(error.value)


def test_a_batch_without_images_has_no_losses() -> None:
    with pytest.raises(ValueError, match="a batch of 0 images"):
        build().losses({name: value[:0] for name, value in batch_for().items()})


def test_raw_values_far_above_white_are_no_image() -> None:
    """Whichever steps draw styles; what is merely bright passes."""
    model = build(style_probability=0.0)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.preprocessing.mean, model.preprocessing.std))
    raw = torch.linspace(0, 10000, SIZE * SIZE).view(1, 1, SIZE, SIZE).expand(2, 3, -1, -1)
    data = batch_for()
    data["image"] = (raw - mean) / std
    with pytest.raises(ValueError, match="value_range=255: images hold raw values up to 10000"):
        model.losses(data)
    model._check_range((raw * 0.05 - mean) / std)
    build(value_range=10000.0)._check_range(data["image"])


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_trains_in_another_dtype(dtype: torch.dtype) -> None:
    model = prepared().to(dtype)
    data = batch_for()
    data["image"] = data["image"].to(dtype)
    assert model._styled(data["image"]).dtype == model.mim.masked(data["image"]).dtype == dtype
    terms = losses_of(model, data)
    wide = torch.promote_types(dtype, torch.float32)
    assert terms["mim"].dtype == terms["delta"].dtype == wide
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
