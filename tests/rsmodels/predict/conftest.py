"""Models whose answer is known for every pixel, and scenes for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from affine import Affine
from rasterio.crs import CRS
from torch import Tensor, nn

import rsmodels
from rsmodels.registry import Preprocessing


class PixelModel(nn.Module):
    """Three bands to four classes, every pixel for itself: the answer is known without any tiles."""

    num_classes = 4
    classes = ("building", "road", "water", "forest")
    palette = ((255, 0, 0), (255, 255, 0), (0, 112, 255), (85, 160, 0))
    preprocessing = Preprocessing((120.0, 110.0, 100.0), (60.0, 55.0, 50.0))

    def __init__(self, image_size: tuple[int, int] = (32, 32)) -> None:
        super().__init__()
        self.image_size = image_size
        self.register_buffer("mix", torch.randn(4, 3, generator=torch.Generator().manual_seed(1)))

    def forward(self, images: Tensor) -> Tensor:
        assert tuple(images.shape[-2:]) == self.image_size
        return torch.einsum("kc,bchw->bkhw", self.mix, images)

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.softmax(1)

    def answer(self, pixels: np.ndarray) -> np.ndarray:
        mean, std = (
            np.array(part)[:, None, None] for part in (self.preprocessing.mean, self.preprocessing.std)
        )
        logits = np.einsum("kc,chw->khw", self.mix.double().numpy(), (pixels - mean) / std)
        return logits


@pytest.fixture(scope="session")
def pixel_model() -> type[PixelModel]:
    """The class, for tests to build one of another size, or one that answers otherwise."""
    return PixelModel


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], None]:
    """Make `predict` load the given model instead of a folder's."""

    def use_model(model: nn.Module) -> None:
        info = {"model": "fake", "classes": PixelModel.classes, "palette": PixelModel.palette}
        monkeypatch.setattr("rsmodels.predict.load_model", lambda *_, **__: (model, info))

    use_model(PixelModel())
    return use_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """best/ of an untrained rs_sam_tiny."""
    folder = tmp_path_factory.mktemp("run") / "best"
    torch.manual_seed(0)
    model = rsmodels.create_model("rs_sam_tiny", num_classes=4, image_size=64)
    rsmodels.save_model(model, folder, {"classes": PixelModel.classes, "palette": PixelModel.palette})
    return folder


@pytest.fixture(scope="session")
def random_pixels() -> Callable[[int, int], np.ndarray]:
    """random_pixels(height, width) -> three bands without a zero."""

    def draw(height: int, width: int) -> np.ndarray:
        return np.random.default_rng(0).integers(1, 256, (3, height, width)).astype(np.uint8)

    return draw


@pytest.fixture
def write_scene(tmp_path: Path, write_raster: Any) -> Callable[..., Path]:
    """write_scene(pixels) -> a GeoTIFF in a UTM zone, north up; `options` replace what it is written with."""
    place = {"crs": CRS.from_epsg(32632), "transform": Affine(2.0, 0, 500_000, 0, -2.0, 5_000_000)}

    def write(pixels: np.ndarray, name: str = "scene.tif", **options: Any) -> Path:
        return write_raster(tmp_path / name, pixels, **{**place, **options})

    return write


@pytest.fixture
def random_scene(write_scene: Any, random_pixels: Any) -> Callable[..., Path]:
    """random_scene(height, width) -> write_scene of random pixels."""

    def write(height: int, width: int, name: str = "scene.tif", **options: Any) -> Path:
        return write_scene(random_pixels(height, width), name, **options)

    return write
