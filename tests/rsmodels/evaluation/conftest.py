"""A model and a data set small enough to know the right answer by heart."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from torch import Tensor, nn

from rsmodels.data import LabelSchema, SegmentationDataset
from rsmodels.data.io import ImageData
from rsmodels.registry import Preprocessing

SCHEMA = LabelSchema(
    classes=("building", "road", "water"),
    palette=((255, 0, 0), (255, 255, 0), (0, 0, 255)),
    raw_to_train={0: 0, 1: 1, 2: 2, 255: 255},
)
ROADS = LabelSchema(
    classes=("background", "road"),
    palette=((0, 0, 0), (255, 255, 255)),
    raw_to_train={0: 0, 1: 1},
    binary=True,
)


class PixelModel(nn.Module):
    """Says of every pixel, alone, the class whose band is the brightest: right wherever the image is true."""

    def __init__(self, classes: int = 3, image_size: tuple[int, int] = (16, 16)) -> None:
        super().__init__()
        self.num_classes = classes
        self.image_size = image_size
        self.preprocessing = Preprocessing((100.0,) * classes, (50.0,) * classes)
        self.calls: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        assert tuple(images.shape[-2:]) == self.image_size, "tiles have the model's input size"
        assert not self.training
        self.calls.append(tuple(images.shape))
        return images

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.softmax(1) if self.num_classes > 1 else logits.sigmoid()


class Scenes(SegmentationDataset):
    """Random masks of the given sizes; images whose band `class` is bright, except where `wrong` says."""

    name = "scenes"

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        *,
        schema: LabelSchema = SCHEMA,
        wrong: float = 0.0,
        domains: Sequence[str] = ("here",),
        seed: int = 0,
    ) -> None:
        self.schema = schema
        self.split = "test"
        self.names = [f"scene-{index}" for index in range(len(sizes))]
        self.domains = [domains[index % len(domains)] for index in range(len(sizes))]
        rng = np.random.default_rng(seed)
        count = len(schema.classes)
        self.masks = [rng.integers(0, count, size).astype(np.uint8) for size in sizes]
        self.predicted = [
            np.where(rng.random(mask.shape) < wrong * index, (mask + 1) % count, mask)
            for index, mask in enumerate(self.masks)
        ]

    def read_image(self, index: int) -> ImageData:
        channels = self.schema.num_logits
        first = 1 if self.schema.binary else 0
        bands = [(self.predicted[index] == first + band) * 200 for band in range(channels)]
        return ImageData(np.stack(bands).astype(np.uint8), None)

    def read_mask(self, index: int) -> np.ndarray:
        return self.masks[index]

    def domain_of(self, index: int) -> str:
        return self.domains[index]


@pytest.fixture
def make_model() -> Callable[..., PixelModel]:
    return PixelModel


@pytest.fixture
def pixel_model() -> PixelModel:
    return PixelModel()


@pytest.fixture
def scenes() -> Callable[..., Scenes]:
    return Scenes


@pytest.fixture
def roads() -> LabelSchema:
    return ROADS
