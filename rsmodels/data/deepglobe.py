"""DeepGlobe road extraction (Demir et al., CVPR Workshops 2018): 6,226 labelled pairs of 1024 x 1024.

root/train/{id}_sat.jpg, root/train/{id}_mask.png. The published valid and test folders have no labels, so
train, val and test are a seeded 70/15/15 draw from `train`. Masks are grey levels: >= 128 is road.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from rsmodels.data.base import (
    FileDataset,
    existing_folder,
    image_files,
    match_pairs,
    register_dataset,
    seeded_split,
)
from rsmodels.data.schema import LabelSchema
from rsmodels.data.transforms import resize_image, resize_mask

SCHEMA = LabelSchema(
    classes=("background", "road"), palette=((40, 40, 40), (255, 255, 255)), binary=True, threshold=128
)


@register_dataset("deepglobe")
class DeepGlobeRoads(FileDataset):
    """size: side that tiles are resized to (RS-SAM: 512), or None for the files' own; seed: of the split."""

    def __init__(
        self,
        root: str | Path | None,
        split: str = "train",
        *,
        size: int | None = 512,
        seed: int = 0,
        bands: Sequence[int] | None = None,
        strict: bool = True,
    ) -> None:
        files = image_files(existing_folder(root, self.name, "train"))
        pairs, problems = match_pairs(
            {key.removesuffix("_sat"): path for key, path in files.items() if key.endswith("_sat")},
            {key.removesuffix("_mask"): path for key, path in files.items() if key.endswith("_mask")},
            domain=self.name,
        )
        chosen = set(seeded_split((pair.name for pair in pairs), split, seed=seed))
        pairs = [pair for pair in pairs if pair.name in chosen]
        super().__init__(
            root, split, pairs=pairs, problems=problems, schema=SCHEMA, bands=bands, strict=strict
        )
        if size is not None and size < 1:
            raise ValueError(f"size {size} is not a number of pixels; RS-SAM uses 512")
        self.size = size

    def prepare(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        if self.size is None or mask.shape == (self.size, self.size):
            return image, mask
        return resize_image(image, self.size), resize_mask(mask, self.size)
