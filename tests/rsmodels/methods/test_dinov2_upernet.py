"""methods/dinov2_upernet.py: the frozen backbone is DINOv2 and stays as it is; the decoder is KTDA's."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rsmodels
from rsmodels.encoders.dinov2 import dinov2_vit_tiny
from rsmodels.methods.teacher import Teacher

SIZE = 64


def tiny(*, num_classes: int = 3, image_size=SIZE, **options):
    torch.manual_seed(0)
    return rsmodels.create_model(
        "dinov2_upernet_tiny", num_classes=num_classes, image_size=image_size, **options
    )


def batch(size: int = 2) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"image": torch.randn(size, 3, SIZE, SIZE), "mask": torch.randint(0, 3, (size, SIZE, SIZE))}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINOv2 in Meta's layout, its norms and layer scales drawn, at another image size."""
    torch.manual_seed(3)
    encoder = dinov2_vit_tiny(image_size=112)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "norm" in name or "gamma" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("dinov2") / "dinov2_vit_tiny.pth"
    torch.save(encoder.state_dict(), path)
    return path


def test_the_backbone_is_the_teacher(checkpoint: Path) -> None:
    model, teacher = tiny(pretrained=str(checkpoint)), Teacher("dinov2_vit_tiny", image_size=SIZE)
    teacher.load_pretrained(str(checkpoint))
    assert model.base_weights and len(model.base_weights) == 64
    data = batch()
    seen: list = []
    model.neck.register_forward_pre_hook(lambda _m, args: seen.extend(args[0]))
    with torch.no_grad():
        logits = model.eval()(data["image"])
    for ours, theirs in zip(seen, teacher(data["image"]), strict=True):
        assert torch.equal(ours, theirs)
    assert [f.shape[-1] for f in model.forward_features(data["image"])] == [20, 10, 5, 2]
    assert logits.shape == (2, 3, SIZE, SIZE)


def test_the_backbone_never_changes(checkpoint: Path) -> None:
    model = tiny(pretrained=str(checkpoint)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert not any(module.training for module in model.backbone.modules())
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    data = batch()
    for _ in range(3):
        optimizer.zero_grad()
        sum(model.losses(data).values()).backward()
        optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if not key.startswith("backbone.")}


@pytest.mark.parametrize("aux_weight", [0.4, 0])
def test_losses(aux_weight: float) -> None:
    model = tiny(aux_weight=aux_weight).eval()
    data = batch()
    logits: dict = {}
    for name in ("head", "aux_head") if aux_weight else ("head",):
        getattr(model, name).register_forward_hook(lambda _m, _i, out, name=name: logits.update({name: out}))
    with torch.no_grad():
        terms = model.losses(data)
    assert list(terms) == (["ce", "aux"] if aux_weight else ["ce"])
    for term, (name, weight) in zip(terms, (("head", 1.0), ("aux_head", 0.4)), strict=False):
        full = torch.nn.functional.interpolate(logits[name].double(), size=SIZE, mode="bilinear")
        ce = full.logsumexp(1) - full.gather(1, data["mask"].unsqueeze(1))[:, 0]
        assert terms[term].item() == pytest.approx(weight * ce.mean().item(), rel=1e-5)


def test_saved_and_loaded_at_another_size(checkpoint: Path, tmp_path: Path) -> None:
    model = tiny(pretrained=str(checkpoint)).eval()
    rsmodels.save_model(model, tmp_path / "best")
    same, _ = rsmodels.load_model(tmp_path / "best")
    image = batch()["image"]
    with torch.no_grad():
        assert torch.equal(same(image), model(image))
        other, _ = rsmodels.load_model(tmp_path / "best", image_size=96)
        assert other(torch.randn(1, 3, 96, 96)).shape == (1, 3, 96, 96)


def test_wide_images_turned_into_tall_ones(tmp_path: Path) -> None:
    """5x10 positions, of 64x128 pixels, become 10x5: as many, and others."""
    model = tiny(image_size=(64, 128))
    rsmodels.save_model(model, tmp_path / "best")
    tall, _ = rsmodels.load_model(tmp_path / "best", image_size=(128, 64))
    before, after = (m.backbone.encoder.pos_embed[:, 1:].transpose(1, 2) for m in (model, tall))
    wide = before.unflatten(2, (5, 10))
    expected = F.interpolate(wide, size=(10, 5), mode="bicubic", align_corners=False)
    torch.testing.assert_close(after.unflatten(2, (10, 5)), expected)


def test_options_of_the_encoder() -> None:
    model = tiny(registers=4, patch_size=16, fit="resize")
    assert model.backbone.grid_size == (4, 4) and model.backbone.encoder.prefix_tokens == 5
    with torch.no_grad():
        assert model(torch.randn(2, 3, SIZE, SIZE)).shape == (2, 3, SIZE, SIZE)


def test_it_is_table_5s() -> None:
    for name, width in zip("sblg", (384, 768, 1024, 1536), strict=True):
        with torch.device("meta"):
            model = rsmodels.create_model(f"dinov2_upernet_vit_{name}", num_classes=5)
        assert model.image_size == (256, 256) and model.backbone.grid_size == (19, 19)
        assert model.backbone.encoder.embed_dim == model.neck.convs[0].in_channels == width


@pytest.mark.parametrize(
    "options, match",
    [
        ({"activation": "tanh"}, "activation='tanh'"),
        ({"aux_weight": -1}, "aux_weight=-1"),
        ({"dropout": 1.5}, "dropout=1.5: expected a finite number of at least 0 and below 1"),
        ({"neck_dim": 0}, "neck_dim=0"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"aux_dim": -1}, "aux_dim=-1"),
        ({"registers": -1}, "registers=-1: expected a finite number of at least 0"),
        ({"mean": (1.0, 2.0)}, r"mean=\(1.0, 2.0\): expected 3 values"),
        ({"fit": "crop"}, "fit='crop'"),
        ({"image_size": 80}, "image_size=80: .*multiple of 32"),
    ],
)
def test_bad_options_are_named(options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        tiny(**options)
    assert not re.search(r"\n", str(error.value))
