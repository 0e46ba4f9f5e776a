"""WHU building data set, aerial imagery (Ji et al., TGRS 2019): 512 x 512 tiles, buildings as 0/255.

root/{train,val,test}/{image,label}/*.tif: the official split, 4,736 / 1,036 / 2,416 tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rsmodels.data.base import FileDataset, existing_folder, image_files, match_pairs, register_dataset
from rsmodels.data.schema import LabelSchema

SCHEMA = LabelSchema(
    classes=("background", "building"),
    palette=((40, 40, 40), (255, 255, 255)),
    raw_to_train={0: 0, 255: 1},
    binary=True,
)


@register_dataset("whu-aerial")
class WHUAerial(FileDataset):
    """The split is a folder; there are no options but `bands`."""

    def __init__(
        self,
        root: str | Path | None,
        split: str = "train",
        *,
        bands: Sequence[int] | None = None,
        strict: bool = True,
    ) -> None:
        images = image_files(existing_folder(root, self.name, split, "image"))
        masks = image_files(existing_folder(root, self.name, split, "label"))
        pairs, problems = match_pairs(images, masks, domain=self.name)
        super().__init__(
            root, split, pairs=pairs, problems=problems, schema=SCHEMA, bands=bands, strict=strict
        )
