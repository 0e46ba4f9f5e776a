"""What a data set is, how it is found by name, and how seeded splits are drawn.

`create_dataset("whdld", root="...", split="train")` gives a `SegmentationDataset`: raw pixels, train ids, the
file's name and its domain, one tile at a time. Nothing is normalised here: mean, std and band order belong to
the model.
"""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rsmodels.data.io import ImageData, read_image, read_mask
from rsmodels.data.schema import IGNORE, LabelSchema

SPLITS = ("train", "val", "test")
RATIOS = (0.70, 0.15, 0.15)
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".jp2", ".img", ".vrt"})
MAX_LISTED = 3  # file names that one error message spells out

_REGISTRY: dict[str, type[SegmentationDataset]] = {}


class SegmentationDataset(Dataset, ABC):
    """Tiles with exact labels. Subclasses give `read_image`, `read_mask`, `names` and `schema`.

    schema:  classes, palette and coding
    names:   one per tile, unique within the data set
    bands:   1-based indices into the files, in order, or None for all of them
    name:    the registered name
    split:   train, val or test
    problems: what is wrong with the listing (a half of a pair missing); empty unless built with strict=False
    notes:  what a reader of its figures must know, one sentence each: they go into every report
    same_split: the split that stands in for one that the set was published without
    """

    splits: ClassVar[tuple[str, ...]] = SPLITS
    same_split: ClassVar[Mapping[str, str]] = {}
    name: str = ""
    schema: LabelSchema
    names: Sequence[str]
    bands: tuple[int, ...] | None = None
    split: str = "train"
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @abstractmethod
    def read_image(self, index: int) -> ImageData:
        """Pixels as the file has them, and where it has any."""

    @abstractmethod
    def read_mask(self, index: int) -> np.ndarray:
        """Train ids, (H, W) uint8."""

    def prepare(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What the data set's protocol does to every tile (DeepGlobe: resize); nothing, by default."""
        return image, mask

    def domain_of(self, index: int) -> str:
        """The domain that tile `index` belongs to: it travels with the sample."""
        return self.name

    def source_of(self, index: int) -> str:
        """What to call tile `index` in a message: its file's path."""
        return self.names[index]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"image": float32 (C, H, W) raw values, "mask": int64 (H, W), "name", "domain"}.

        Pixels that the file marks as empty (nodata, alpha 0) are 0 in the image and `IGNORE` in the mask.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name}: tile {index} of {len(self)}")
        index %= len(self)
        image, ids = self.read_image(index), self.read_mask(index)
        check_same_size(image.pixels, ids, self.source_of(index))
        pixels = image.pixels.astype(np.float32)
        mask = ids.astype(np.int64)
        if image.valid is not None:
            pixels = pixels * image.valid
            mask[~image.valid] = IGNORE
        image_chw, mask_hw = self.prepare(torch.from_numpy(pixels), torch.from_numpy(mask))
        return {
            "image": image_chw,
            "mask": mask_hw,
            "name": self.names[index],
            "domain": self.domain_of(index),
        }


@dataclass(frozen=True)
class Pair:
    """One tile on disk."""

    name: str
    image: Path
    mask: Path
    domain: str


class FileDataset(SegmentationDataset):
    """A data set of image and mask files. Subclasses hand their listing to `__init__`."""

    def __init__(
        self,
        root: str | Path | None,
        split: str,
        *,
        pairs: Iterable[Pair],
        problems: Iterable[str],
        schema: LabelSchema,
        bands: Sequence[int] | None = None,
        strict: bool = True,
    ) -> None:
        self.root, self.split, self.schema = root, split, schema
        self.pairs = list(pairs)
        self.problems = tuple(problems)
        self.bands = checked_bands(bands)
        self.names = [pair.name for pair in self.pairs]
        if strict and self.problems:
            more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
            raise ValueError(f"{self.problems[0]}{more}; `rsmodels check-data` lists all of them")
        if strict and not self.pairs:
            raise ValueError(
                f"{root}: split {split!r} of {self.name} is empty; check the folder and its layout"
            )

    def read_image(self, index: int) -> ImageData:
        return read_image(self.pairs[index].image, self.bands)

    def read_mask(self, index: int) -> np.ndarray:
        path = self.pairs[index].mask
        raw = read_mask(path, colors=self.schema.colors is not None)
        return self.schema.encode(raw, source=str(path))

    def domain_of(self, index: int) -> str:
        return self.pairs[index].domain

    def source_of(self, index: int) -> str:
        return str(self.pairs[index].image)


# ----------------------------------------------------------------------------------------------- registry

Class = TypeVar("Class", bound=type[SegmentationDataset])


def register_dataset(name: str) -> Callable[[Class], Class]:
    """Announce a data set class under `name`."""

    def announce(cls: Class) -> Class:
        if name in _REGISTRY:
            raise ValueError(f"data set {name!r} is registered twice")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return announce


def list_datasets() -> list[str]:
    """Names that `create_dataset` knows."""
    return sorted(_REGISTRY)


def dataset_class(name: str) -> type[SegmentationDataset]:
    """The class registered under `name`."""
    if name not in _REGISTRY:
        raise ValueError(f"data set {name!r} is unknown; known: {', '.join(list_datasets())}")
    return _REGISTRY[name]


def dataset_options(name: str) -> list[str]:
    """Options that `create_dataset(name, ...)` takes besides root and split."""
    parameters = inspect.signature(dataset_class(name).__init__).parameters
    return [key for key in parameters if key not in ("self", "root", "split", "strict")]


def create_dataset(
    name: str, *, root: str | Path | None = None, split: str = "train", **options: Any
) -> SegmentationDataset:
    """Build a data set by name.

    root:    its folder (none for `synthetic`)
    split:   train, val or test
    options: what `dataset_options(name)` lists
    Raises ValueError for an unknown name, split or option, FileNotFoundError for a missing folder.
    """
    cls = dataset_class(name)
    if split not in cls.splits:
        raise ValueError(f"split {split!r} is not one of {', '.join(cls.splits)} of data set {name!r}")
    allowed = dataset_options(name)
    unknown = [key for key in options if key not in (*allowed, "strict")]
    if unknown:
        raise ValueError(
            f"data set {name!r} has no option {unknown[0]!r}; it has: {', '.join(allowed) or 'none'}"
        )
    return cls(root=root, split=split, **options)  # type: ignore[call-arg]


# ------------------------------------------------------------------------------------- listing and splits


def existing_folder(root: str | Path | None, name: str, *parts: str) -> Path:
    """`root/parts...` where it is a folder; a FileNotFoundError that says what was expected otherwise."""
    if root is None:
        raise ValueError(f"data set {name!r} needs root, the folder that holds it (--root DIR)")
    folder = Path(root, *parts)
    if not folder.is_dir():
        wanted = f" (data set {name!r} expects {'/'.join(parts)} under its root)" if parts else ""
        raise FileNotFoundError(f"{folder}: no such folder{wanted}")
    return folder


def image_files(folder: Path) -> dict[str, Path]:
    """Stem -> path of every image file in `folder`, sorted; hidden files are not data."""
    files = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    stems: dict[str, Path] = {}
    for path in files:
        if path.stem in stems:
            raise ValueError(f"{path}: {stems[path.stem].name} has the same name; keep one of the two")
        stems[path.stem] = path
    return stems


def match_pairs(
    images: Mapping[str, Path], masks: Mapping[str, Path], *, domain: str, prefix: str = ""
) -> tuple[list[Pair], list[str]]:
    """Join images and masks by key. Returns pairs in the order of their names, and what has no other half."""
    pairs = [
        Pair(prefix + key, images[key], masks[key], domain) for key in sorted(images.keys() & masks.keys())
    ]
    problems = [f"{images[key]}: the image has no mask" for key in sorted(images.keys() - masks.keys())]
    problems += [f"{masks[key]}: the mask has no image" for key in sorted(masks.keys() - images.keys())]
    return pairs, problems


def seeded_split(
    names: Iterable[str], split: str, *, seed: int = 0, ratios: Sequence[float] = RATIOS
) -> list[str]:
    """The names of one split: a pure function of the set of names, the ratios and the seed.

    Names are ordered by a hash of seed and name, then cut, so the draw depends on no library's generator.
    """
    if len(ratios) != len(SPLITS) or min(ratios) < 0 or abs(sum(ratios) - 1) > 1e-6:
        raise ValueError(f"ratios {list(ratios)} are not three shares (train, val, test) that add up to 1")
    ordered = sorted(set(names), key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    first = round(len(ordered) * ratios[0])
    second = round(len(ordered) * (ratios[0] + ratios[1]))
    cut = {"train": slice(None, first), "val": slice(first, second), "test": slice(second, None)}[split]
    return sorted(ordered[cut])


def checked_bands(bands: Sequence[int] | None) -> tuple[int, ...] | None:
    """`bands` as a tuple; they count from 1."""
    if bands is None:
        return None
    checked = tuple(int(band) for band in bands)
    if not checked or min(checked) < 1:
        raise ValueError(f"bands {list(bands)}: give at least one; they count from 1")
    return checked


def check_same_size(pixels: np.ndarray, ids: np.ndarray, source: str) -> None:
    """Image and mask cover the same pixels, or a ValueError names both sizes (height x width)."""
    if pixels.shape[-2:] != ids.shape:
        image, mask = (f"{height}x{width}" for height, width in (pixels.shape[-2:], ids.shape))
        raise ValueError(f"{source}: the image is {image} pixels, its mask is {mask}; they must be equal")
