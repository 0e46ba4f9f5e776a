"""encoders/cnn.py: any four-stage network of timm, with timm's weights."""

import re
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from rsmodels.encoders.cnn import checkpoint_stages, load_timm_stages, stage_maps, timm_stages

SMALL = {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 20)}
SWIN = {"depths": (1, 1, 1, 1), "embed_dim": 8, "num_heads": (1, 1, 2, 2)}
TWINS = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 24, 32), "num_heads": (1, 1, 2, 2)}


@pytest.mark.parametrize(
    "name, options",
    [
        ("convnext_atto", SMALL),
        ("resnet18", {"drop_path_rate": 0.1}),  # has a stem at 1/2 before its stages
        ("mobilenetv3_small_050", {}),
        ("mambaout_femto", SMALL),  # channels last
        ("swin_tiny_patch4_window7_224", SWIN),  # channels last, built for one size
        ("twins_svt_small", TWINS),  # built for one size, and wrapped whole
    ],
)
def test_stages(name: str, options: dict) -> None:
    stages = timm_stages(name, image_size=(64, 96), **options).eval()
    with torch.no_grad():
        maps = stage_maps(stages, torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape[-2:]) for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert [m.shape[1] for m in maps] == stages.feature_info.channels()


@pytest.mark.parametrize("name, options", [("swin_tiny_patch4_window7_224", SWIN), ("convnext_atto", SMALL)])
def test_activation_checkpointing(name: str, options: dict) -> None:
    torch.manual_seed(0)
    stages = timm_stages(name, image_size=(64, 64), drop_path_rate=0.0, **options)
    images = torch.randn(2, 3, 64, 64)
    gradients = []
    for enabled in (False, True):
        checkpoint_stages(stages, name, enabled)
        stages.zero_grad()
        sum(level.square().mean() for level in stage_maps(stages, images)).backward()
        gradients.append([p.grad.clone() for p in stages.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_student_without_checkpointing_says_so() -> None:
    stages = timm_stages("twins_svt_small", image_size=(64, 64), **TWINS)
    checkpoint_stages(stages, "twins_svt_small", False)
    with pytest.raises(ValueError, match="student 'twins_svt_small' of timm has none") as error:
        checkpoint_stages(stages, "twins_svt_small", True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, size, found",
    [("efficientformer_l1", 32, "batch2 tensor"), ("inception_v4", 64, "Kernel size")],
)
def test_a_size_that_a_network_cannot_take(name: str, size: int, found: str) -> None:
    expected = f"^student '{name}': cannot take images of {size}x{size} pixels .*{found}"
    with pytest.raises(ValueError, match=expected) as error:
        timm_stages(name, image_size=(size, size))
    assert "\n" not in str(error.value)


def test_the_check_of_the_size_leaves_no_trace() -> None:
    torch.manual_seed(0)
    plain = timm_stages("resnet18")
    drawn = torch.rand(1)
    torch.manual_seed(0)
    checked = timm_stages("resnet18", image_size=(64, 96))
    assert torch.equal(drawn, torch.rand(1))
    for (key, a), b in zip(plain.state_dict().items(), checked.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


class Holder(nn.Module):
    def __init__(self, name: str, size: int = 64, **options) -> None:
        super().__init__()
        self.student = timm_stages(name, image_size=(size, size), **options)
        self.rest = nn.Linear(2, 2)


@pytest.mark.parametrize(
    "name, options",
    [
        ("convnext_atto", SMALL),
        ("mobilenetv3_small_050", {}),
        ("swin_tiny_patch4_window7_224", {**SWIN, "img_size": 64}),
        ("twins_svt_small", {**TWINS, "img_size": 64}),
    ],
)
@torch.no_grad()
def test_timms_weights_load(name: str, options: dict, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=7, **options).eval()
    torch.save(theirs.state_dict(), tmp_path / "whole.pth")
    model = Holder(name, **options).eval()
    report = load_timm_stages(model, "student", str(tmp_path / "whole.pth"))
    image = torch.randn(1, 3, 64, 64)
    expected = theirs.forward_intermediates(image, indices=4, intermediates_only=True)
    for a, b in zip(stage_maps(model.student, image), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert set(report.dropped.values()) == {"behind the last stage"} and len(report.dropped) >= 2
    assert report.initialised == ["rest.weight", "rest.bias"]
    assert len(report.loaded) + len(report.dropped) == len(theirs.state_dict())


def test_weights_of_another_network_are_an_error(tmp_path: Path) -> None:
    deeper = timm.create_model("convnext_atto", **{**SMALL, "depths": (1, 1, 2, 1)})
    torch.save(deeper.state_dict(), tmp_path / "deeper.pth")
    with pytest.raises(
        ValueError, match=r"deeper.pth: .* keys match nothing in this model .*stages\.2\.blocks\.1"
    ):
        load_timm_stages(Holder("convnext_atto", **SMALL), "student", str(tmp_path / "deeper.pth"))


def test_weights_for_another_image_size_are_named(tmp_path: Path) -> None:
    name = "swin_tiny_patch4_window7_224"
    torch.save(timm.create_model(name, **SWIN).state_dict(), tmp_path / "whole.pth")
    with pytest.raises(ValueError, match=r"bias_table has shape .* one image size: .* 224x224") as error:
        load_timm_stages(Holder(name, **SWIN), "student", str(tmp_path / "whole.pth"))
    assert "\n" not in str(error.value)
    load_timm_stages(Holder(name, 224, **SWIN), "student", str(tmp_path / "whole.pth"))


@pytest.mark.parametrize(
    "name, options, found",
    [
        ("no_such_net", {}, "no_such_net"),
        ("resnet18", {"act_layer": "nonsense"}, "('nonsense')"),
        ("resnet18", {"checkpoint_path": "/no/such.pth"}, "(FileNotFoundError)"),
        ("vit_tiny_patch16_224", {}, "1/16, 1/16"),
        ("resnet18", {"dims": 3}, "dims"),
    ],
)
def test_networks_that_do_not_serve(name: str, options: dict, found: str) -> None:
    with pytest.raises(ValueError, match=f"^student '{name}': .*{re.escape(found)}") as error:
        timm_stages(name, **options)
    assert "\n" not in str(error.value)
