"""The grass set of KTDA (Zhang et al., 2024): 1,500 tiles of 256 x 256, five levels of coverage.

root/img_dir/{train,val}/N.tif (Gaofen-2 and -6, RGB, 8 m), root/ann_dir/{train,val}/N.png with labels 0-4, as
grey values or as palette indices: the index is the label. 1,200 tiles are for training; the other 300 are the
paper's test set, on which it validates, too: `test` is `val` here, and every report says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from rsmodels.data.base import FileDataset, existing_folder, image_files, match_pairs, register_dataset
from rsmodels.data.schema import LabelSchema

SCHEMA = LabelSchema(
    classes=("low", "middle-low", "middle", "middle-high", "high"),
    palette=((185, 101, 71), (248, 202, 155), (211, 232, 158), (138, 191, 104), (92, 144, 77)),
    raw_to_train={raw: raw for raw in range(5)},
)


@register_dataset("grass")
class Grass(FileDataset):
    """The split is a folder; there are no options but `bands`."""

    same_split: ClassVar[Mapping[str, str]] = {"test": "val"}

    def __init__(
        self,
        root: str | Path | None,
        split: str = "train",
        *,
        bands: Sequence[int] | None = None,
        strict: bool = True,
    ) -> None:
        folder = self.same_split.get(split, split)
        images = image_files(existing_folder(root, self.name, "img_dir", folder))
        masks = image_files(existing_folder(root, self.name, "ann_dir", folder))
        pairs, problems = match_pairs(images, masks, domain=self.name)
        super().__init__(
            root, split, pairs=pairs, problems=problems, schema=SCHEMA, bands=bands, strict=strict
        )
        if folder != split:
            self.notes = (
                f"{self.name} was published without a {split} split: these are its {folder} images, as in "
                "the paper. Of a checkpoint chosen on them, the figures are higher than on unseen images.",
            )
