"""SyntheticEarth: procedural aerial scenes with exact labels, nothing on disk, same seed = same pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rsmodels.data.base import SPLITS, SegmentationDataset, checked_bands, register_dataset
from rsmodels.data.io import ImageData
from rsmodels.data.schema import Color, LabelSchema
from rsmodels.data.synthetic.domains import Domain
from rsmodels.data.synthetic.paint import CLASSES
from rsmodels.data.synthetic.scene import Scene, render_scene

ALL_CLASSES = (*CLASSES, "cloud")
CLOUD = len(CLASSES)
PALETTE: dict[str, Color] = {
    "building": (200, 40, 40), "road": (240, 220, 60), "water": (50, 90, 220),
    "field": (150, 220, 110), "forest": (20, 110, 40), "bare soil": (190, 140, 90),
    "cloud": (235, 235, 245), "background": (60, 60, 60),
}  # fmt: skip
LENGTHS = {"train": 1000, "val": 100, "test": 200}


@register_dataset("synthetic")
class SyntheticEarth(SegmentationDataset):
    """Tile `i` is a pure function of (seed, split, i, domain, size); each split draws its own scenes.

    size:    side of a tile in pixels
    length:  number of tiles (default: 1000 train, 100 val, 200 test)
    domain:  a `Domain` or its text, "region=coast,bands=irrg"
    classes: names, as a list or comma-separated. Default: building, road, water, field (crops, grass,
             gardens), forest (and single trees), bare soil (and sand, yards). "cloud" may be added. Of a
             part of them, one class makes a binary task, more get a "background" with id 0.
    bands:   1-based, of the bands that the domain has
    """

    def __init__(
        self,
        root: str | Path | None = None,
        split: str = "train",
        *,
        seed: int = 0,
        size: int = 256,
        length: int | None = None,
        domain: Domain | str | None = None,
        classes: str | Sequence[str] | None = None,
        bands: Sequence[int] | None = None,
        strict: bool = True,
    ) -> None:
        if root is not None:
            raise ValueError(f"root {str(root)!r}: the synthetic data set has no files; leave root out")
        if seed < 0:
            raise ValueError(f"seed {seed} is negative; seeds count from 0")
        if size < 16:
            raise ValueError(f"size {size}: a synthetic tile is at least 16 pixels wide")
        self.split, self.seed, self.size = split, seed, size
        self.domain = as_domain(domain)
        self.schema = synthetic_schema(classes)
        self.bands = checked_bands(bands)
        count = LENGTHS[split] if length is None else length
        if count < 1:
            raise ValueError(f"length {count}: a data set has at least one tile")
        self.names = [f"synthetic-{split}-{seed}-{index:06d}" for index in range(count)]
        self._last: tuple[int, Scene] | None = None

    def scene(self, index: int) -> Scene:
        """The rendered scene; the last one is kept, because image and mask are asked for in turn."""
        if self._last is None or self._last[0] != index:
            key = (self.seed, SPLITS.index(self.split), index)
            self._last = index, render_scene(key, self.size, self.domain)
        return self._last[1]

    def read_image(self, index: int) -> ImageData:
        image = self.scene(index).image
        if self.bands is not None:
            if max(self.bands) > len(image):
                raise ValueError(f"bands {list(self.bands)}: domain {self.domain} has bands 1-{len(image)}")
            image = image[[band - 1 for band in self.bands]]
        return ImageData(image, None)

    def read_mask(self, index: int) -> np.ndarray:
        return self.schema.encode(raw_labels(self.scene(index), self.schema), source=self.names[index])

    def domain_of(self, index: int) -> str:
        return str(self.domain)


def raw_labels(scene: Scene, schema: LabelSchema) -> np.ndarray:
    """(H, W) index into `ALL_CLASSES`; cloud hides the ground only where the schema has a class for it."""
    if "cloud" not in schema.classes:
        return scene.classes
    return np.where(scene.cloud, np.uint8(CLOUD), scene.classes)


def synthetic_schema(classes: str | Sequence[str] | None = None) -> LabelSchema:
    """The schema for a choice of classes (see `SyntheticEarth`)."""
    if classes is None:
        chosen: tuple[str, ...] = CLASSES
    elif isinstance(classes, str):
        chosen = tuple(name.strip() for name in classes.split(",") if name.strip())
    else:
        chosen = tuple(classes)
    unknown = [name for name in chosen if name not in ALL_CLASSES]
    if unknown or not chosen:
        raise ValueError(f"classes {list(chosen)}: choose from {', '.join(ALL_CLASSES)}")
    complete = set(CLASSES) <= set(chosen)
    names = chosen if complete else ("background", *chosen)
    return LabelSchema(
        classes=names,
        palette=tuple(PALETTE[name] for name in names),
        raw_to_train={raw: names.index(name) if name in names else 0 for raw, name in enumerate(ALL_CLASSES)},
        binary=len(chosen) == 1,
    )


def as_domain(domain: Domain | str | None) -> Domain:
    """A domain from its text; None is the default one."""
    if domain is None:
        return Domain()
    return domain if isinstance(domain, Domain) else Domain.parse(domain)
