"""The frozen teacher: which maps it gives, how images are fitted to it, and that nothing ever changes it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rsmodels
from rsmodels.methods.teacher import Teacher, teacher_grid
from rsmodels.registry import ENCODERS, TEACHER_OF, TEACHERS


def make(**options: Any) -> Teacher:
    torch.manual_seed(0)
    return rsmodels.create_teacher("dinov2_vit_tiny", **{"image_size": 32, **options})


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_maps_are_raw_but_the_last_which_is_normed() -> None:
    teacher = make(image_size=(32, 50), fit="pad")
    images = draw(2, 3, 32, 50)
    maps = teacher(images)
    assert [tuple(level.shape) for level in maps] == [(2, 128, 3, 4)] * 4
    padded = F.pad(images, (0, 6, 0, 10))
    raw = teacher.encoder.forward_intermediates(padded, (0, 1, 2, 3))
    assert all(torch.equal(a, b) for a, b in zip(maps[:3], raw[:3], strict=True))
    normed = teacher.encoder(padded)[:, 1:].transpose(1, 2).unflatten(2, (3, 4))
    torch.testing.assert_close(maps[3], normed)
    assert not torch.equal(maps[3], raw[3])


def test_images_are_stretched_where_asked() -> None:
    images = draw(1, 3, 32, 32)
    stretched = F.interpolate(images, size=(42, 42), mode="bilinear", align_corners=False)
    teacher = make(fit="resize")
    expected = make(image_size=42)
    expected.load_state_dict(teacher.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(teacher(images), expected(stretched), strict=True))
    assert not torch.equal(teacher(images)[0], make(fit="pad")(images)[0])


@pytest.mark.parametrize("fit", ["pad", "resize"])
def test_an_image_that_fits_is_left_alone(fit: str) -> None:
    images = draw(1, 3, 28, 28)
    teacher = make(image_size=28, fit=fit)
    expected = teacher.encoder.forward_intermediates(images, (0, 1, 2, 3), normed=(3,))
    assert all(torch.equal(a, b) for a, b in zip(teacher(images), expected, strict=True))


@pytest.mark.parametrize("size, patch, grid", [((256, 256), 14, (19, 19)), ((512, 256), 16, (32, 16))])
def test_grid(size: tuple[int, int], patch: int, grid: tuple[int, int]) -> None:
    assert teacher_grid(size, patch) == grid


def test_it_never_learns() -> None:
    teacher = make()
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    images = draw(1, 3, 32, 32).requires_grad_()
    assert not any(level.requires_grad for level in teacher(images))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_every_published_depth_has_its_blocks() -> None:
    assert set(TEACHERS) == {name for name in ENCODERS if name.startswith("dinov2_")}
    assert set(TEACHER_OF.values()) <= set(TEACHERS)
    with torch.device("meta"):
        found = {name: rsmodels.create_teacher(name, image_size=28).taps for name in TEACHERS}
    assert found["dinov2_vit_b"] == found["dinov2_vit_s"] == (2, 5, 8, 11)
    assert found["dinov2_vit_l"] == (7, 11, 15, 23) and found["dinov2_vit_g"] == (9, 19, 29, 39)


def test_the_hash_follows_the_weights_and_nothing_else() -> None:
    teacher, other = make(), make(fit="resize")
    assert len(teacher.sha256()) == 64 and teacher.sha256() == other.sha256()
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-6
    assert teacher.sha256() != other.sha256()


def test_weights_come_from_a_file(tmp_path: Any) -> None:
    torch.save(make().encoder.state_dict(), tmp_path / "dinov2.pth")
    torch.manual_seed(5)
    loaded = rsmodels.create_teacher(
        "dinov2_vit_tiny", image_size=32, pretrained=str(tmp_path / "dinov2.pth")
    )
    assert loaded.sha256() == make().sha256()
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize(
    "name, options, parts",
    [
        ("dinov2_vitb", {}, ("teacher 'dinov2_vitb'", "did you mean dinov2_vit_b")),
        ("sam_vit_b", {}, ("no such teacher",)),
        ("dinov2_vit_tiny", {"fit": "crop"}, ("fit='crop'", "pad, resize")),
        ("dinov2_vit_tiny", {"depth": 3}, ("no option 'depth'", "registers")),
        ("dinov2_vit_tiny", {"registers": "four"}, ("registers='four'", "int")),
        ("dinov2_vit_tiny", {"patch_size": 0}, ("patch_size=0", "14, 16")),
    ],
)
def test_bad_arguments_are_one_line(
    name: str, options: dict[str, Any], parts: tuple[str, ...], one_line: Any
) -> None:
    with pytest.raises(ValueError) as error:
        rsmodels.create_teacher(name, image_size=32, **options)
    one_line(error, *parts)


def test_images_of_another_size_are_refused(one_line: Any) -> None:
    with pytest.raises(ValueError) as error:
        make()(draw(1, 3, 64, 64))
    one_line(error, "(1, 3, 64, 64)", "(B, 3, 32, 32)")
