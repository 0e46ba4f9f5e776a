"""The maps of a network's layers: those that it computes itself, whatever stands around its encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rsmodels
from rsmodels.evaluation.layers import _maps, open_layers


def saved(name: str, folder: Path, **options: Any) -> tuple[Any, str]:
    """A model with random weights, and the folder that it is saved in."""
    torch.manual_seed(3)
    model = rsmodels.create_model(name, num_classes=3, image_size=64, **options)
    rsmodels.save_model(model, folder / name)
    return model.eval(), str(folder / name)


def pixels(batch: int = 2, side: int = 64) -> Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1)) * 255


def test_a_trained_models_layers_are_its_encoders(tmp_path: Path) -> None:
    model, folder = saved("rs_sam_tiny", tmp_path)
    layers = open_layers(folder, layers=(-1, 1), device="cpu")
    assert (layers.name, layers.indices, layers.strides) == ("rs_sam_tiny", (1, 3), (16, 16))
    assert layers.image_size == (64, 64)
    with torch.no_grad():
        expected = model.encoder.forward_intermediates(model.preprocessing.normalize(pixels()), (1, 3))
    for _ in range(2):  # looking leaves the model as it was
        assert all(torch.equal(a, b) for a, b in zip(layers(pixels()), expected, strict=True))


def test_a_cnns_layers_are_its_stages(tmp_path: Path) -> None:
    model, folder = saved("ktda_tiny", tmp_path)
    layers = open_layers(folder, layers=(0, 3), device="cpu")
    assert layers.strides == (4, 32)
    with torch.no_grad():
        stages = model.student(model.preprocessing.normalize(pixels()))
    for _ in range(2):
        first, last = layers(pixels())
        assert torch.equal(first, stages[0]) and torch.equal(last, stages[3])


def test_what_a_network_does_before_its_encoder_is_done(tmp_path: Path) -> None:
    """This one pads 64 pixels to five patches of 14, and normalises the last block's map."""
    model, folder = saved("dinov2_upernet_tiny", tmp_path)
    layers = open_layers(folder, device="cpu")
    assert layers.indices == (3,) and layers.strides == (14,)
    with torch.no_grad():
        expected = model.backbone(model.preprocessing.normalize(pixels()))[3]
    (found,) = layers(pixels())
    assert found.shape[-2:] == (5, 5) and torch.equal(found, expected)


def test_what_a_network_does_between_the_blocks_is_done() -> None:
    class Encoder(nn.Module):
        def forward_intermediates(
            self, images: Tensor, indices: tuple[int, ...], *, add: int
        ) -> list[Tensor]:
            return [images + index + add for index in indices]

    class Refined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Encoder()

        def forward(self, images: Tensor) -> Tensor:
            self.encoder.forward_intermediates(images, (2,), add=100)
            raise AssertionError("the decoder need not run")

    network = Refined()
    found = _maps(network, network.encoder, torch.zeros(1), (0, 5))
    assert [one.item() for one in found] == [100, 105]
    assert "forward_intermediates" not in vars(network.encoder)


def test_an_encoder_by_its_name(sam_checkpoint: Path) -> None:
    source = str(sam_checkpoint)
    layers = open_layers("sam_vit_tiny", layers=(1,), pretrained=source, tile=128, device="cpu")
    alone = rsmodels.create_backbone("sam_vit_tiny", out_indices=(1,), image_size=128, pretrained=source)
    with torch.no_grad():
        (expected,) = alone.eval()(layers.preprocessing.normalize(pixels(side=128)))
    assert torch.equal(layers(pixels(side=128))[0], expected)


def test_an_encoder_without_weights_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="sam_vit_tiny has random weights"):
        layers = open_layers("sam_vit_tiny", tile=64, model_args={"in_chans": 4, "in_chans_mode": "repeat"})
    assert layers.indices == (3,) and len(layers.preprocessing.mean) == 4
    assert layers(torch.rand(1, 4, 64, 64))[0].shape == (1, 128, 4, 4)


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    model, _ = saved("rs_sam_tiny", tmp_path)
    with torch.no_grad():
        model.encoder.blocks[0].norm1.weight.fill_(float("nan"))
    rsmodels.save_model(model, tmp_path / "broken")
    with pytest.raises(ValueError, match="rs_sam_tiny: its features are not finite"):
        open_layers(tmp_path / "broken", device="cpu")(pixels())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"model": "nowhere"}, r"--model nowhere: neither a folder of a trained model.*dinov2_vit_b"),
        ({"layers": (4,)}, r"--layers 4: rs_sam_tiny has the layers 0 to 3"),
        ({"layers": (0, -5)}, r"--layers 0,-5: "),
        ({"pretrained": "sam.pth"}, r"--pretrained is for an encoder"),
        ({"model_args": {"registers": 4}}, r"--model-args is for an encoder"),
        (
            {"model": "dinov2_vit_tiny", "model_args": {"colour": 1}},
            r"dinov2_vit_tiny has no option 'colour'",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    options: dict[str, Any], expected: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    _, folder = saved("rs_sam_tiny", tmp_path_factory.mktemp("model"))
    with pytest.raises(ValueError, match=expected) as error:
        open_layers(**{"model": folder, "device": "cpu", **options})
    assert "\n" not in str(error.value)
