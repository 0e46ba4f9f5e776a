"""WHDLD, the Wuhan dense labelling data set (Shao et al., 2018): 4,940 tiles of 256 x 256, six classes.

root/Images/whNNNN.jpg, root/ImagesPNG/whNNNN.png with labels 1-6, as grey values or as palette indices: the
index is the label. Train, val and test are a seeded 70/15/15 draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rsmodels.data.base import (
    FileDataset,
    existing_folder,
    image_files,
    match_pairs,
    register_dataset,
    seeded_split,
)
from rsmodels.data.schema import LabelSchema

SCHEMA = LabelSchema(
    classes=("building", "road", "pavement", "vegetation", "bare soil", "water"),
    palette=((255, 0, 0), (255, 255, 0), (192, 192, 0), (0, 255, 0), (128, 128, 128), (0, 0, 255)),
    raw_to_train={raw: raw - 1 for raw in range(1, 7)},
)


@register_dataset("whdld")
class WHDLD(FileDataset):
    """seed: of the split."""

    def __init__(
        self,
        root: str | Path | None,
        split: str = "train",
        *,
        seed: int = 0,
        bands: Sequence[int] | None = None,
        strict: bool = True,
    ) -> None:
        images = image_files(existing_folder(root, self.name, "Images"))
        masks = image_files(existing_folder(root, self.name, "ImagesPNG"))
        pairs, problems = match_pairs(images, masks, domain=self.name)
        chosen = set(seeded_split((pair.name for pair in pairs), split, seed=seed))
        pairs = [pair for pair in pairs if pair.name in chosen]
        super().__init__(
            root, split, pairs=pairs, problems=problems, schema=SCHEMA, bands=bands, strict=strict
        )
