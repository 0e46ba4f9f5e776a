"""L8 Biome (Foga et al., RSE 2017; doi:10.5066/F7251GDH): 96 Landsat 8 scenes, clouds labelled by hand.

Two layouts, told apart by what lies under root:

- tiles, as the authors of KTDA cut them: {img_dir,ann_dir}/{train,val,test}/*.png, RGB, labels 0-3, the split
  as given;
- scenes, as the USGS or torchgeo hand them out: anywhere under root LC8*_fixedmask.TIF (or .img), beside it
  LC8*.TIF with Landsat's bands 1 to 11 in order, or one file per band, LC8*_B1.TIF to LC8*_B11.TIF; the
  stack is read where both are there. Patches of 512 pixels lie on a grid from the upper left corner, whole
  ones only; those of nothing but fill are left out; train, val and test are a seeded 6:2:2 draw of patches.

Scenes have 16 bits, tiles 8; and the script that cut these turned fill into clear, where the fill of a scene
is ignored: figures of the two layouts do not compare.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from rasterio.windows import Window

from rsmodels.data.base import (
    FileDataset,
    Pair,
    existing_folder,
    image_files,
    match_pairs,
    register_dataset,
    seeded_split,
)
from rsmodels.data.io import ImageData, count_bands, read_image, read_mask, read_size
from rsmodels.data.schema import IGNORE, LabelSchema

CLASSES = ("clear", "shadow", "thin cloud", "cloud")
# The authors' palette is four greys from black on; black is the colour of ignored pixels here.
PALETTE = ((84, 130, 53), (51, 63, 107), (157, 195, 230), (255, 255, 255))
TILES = LabelSchema(CLASSES, PALETTE, {raw: raw for raw in range(4)})
SCENES = LabelSchema(CLASSES, PALETTE, {0: IGNORE, 128: 0, 64: 1, 192: 2, 255: 3})

BIOMES = ("barren", "forest", "grass_crops", "shrubland", "snow_ice", "urban", "water", "wetlands")
RATIOS = (0.6, 0.2, 0.2)
RGB = (4, 3, 2)
BANDS = 11
PANCHROMATIC = 8
SCENE_FILE = re.compile(r"(LC8\d+_?[A-Z]{3}\d{2})(?:_(B\d{1,2}|fixedmask))?\.(?:tif|tiff|img)", re.IGNORECASE)


@dataclass(frozen=True)
class Scene:
    """The files of one scene: mask, and either a stack of all bands or files of one band each, by number."""

    name: str
    domain: str
    mask: Path
    stack: Path | None
    single: dict[int, Path]

    def parts(self, bands: Sequence[int]) -> list[tuple[Path, tuple[int, ...]]]:
        """The files that hold `bands`, in order, and which bands of each to read.

        Raises FileNotFoundError for a band that has no file.
        """
        if self.stack is not None:
            return [(self.stack, tuple(bands))]
        missing = [band for band in bands if band not in self.single]
        if missing:
            raise FileNotFoundError(
                f"{self.mask.parent / self.name}_B{missing[0]}.TIF: no such file; "
                f"the scene lacks band {missing[0]}"
            )
        return [(self.single[band], (1,)) for band in bands]


@dataclass(frozen=True)
class Patch(Pair):
    """A window of a scene."""

    scene: Scene
    window: Window


@register_dataset("l8-biome")
class L8Biome(FileDataset):
    """size: side of a scene's patches in pixels (KTDA: 512); seed: of the draw of a scene's patches
    bands: of scenes, Landsat's own numbers, by default 4, 3, 2: red, green, blue, as the tiles have them
    """

    def __init__(
        self,
        root: str | Path | None,
        split: str = "train",
        *,
        size: int = 512,
        seed: int = 0,
        bands: Sequence[int] | None = None,
        strict: bool = True,
    ) -> None:
        folder = existing_folder(root, self.name)
        files = _scene_files(folder)
        notes: tuple[str, ...] = ()
        pairs: Sequence[Pair]
        if (folder / "img_dir").is_dir():
            if files:
                raise ValueError(
                    f"{folder}: holds tiles (img_dir) and scenes ({next(iter(files))}); give the folder "
                    "of one of them"
                )
            schema = TILES
            pairs, problems = _tiles(folder, split)
            notes = _shared_with_val(folder, split, pairs)
        elif files:
            if size < 1:
                raise ValueError(f"size {size} is not a number of pixels; KTDA's patches have 512")
            schema = SCENES
            bands = RGB if bands is None else bands
            pairs, problems = _patches(files, _landsat_bands(bands), size)
            chosen = set(seeded_split((pair.name for pair in pairs), split, seed=seed, ratios=RATIOS))
            pairs = [pair for pair in pairs if pair.name in chosen]
        else:
            raise FileNotFoundError(
                f"{folder}: found neither tiles (img_dir/{split}, ann_dir/{split}) nor scenes "
                "(LC8*_fixedmask.TIF beside LC8*.TIF or LC8*_B4.TIF) under it"
            )
        super().__init__(
            root, split, pairs=pairs, problems=problems, schema=schema, bands=bands, strict=strict
        )
        self.notes = notes

    def read_image(self, index: int) -> ImageData:
        patch = self.pairs[index]
        if not isinstance(patch, Patch):
            return super().read_image(index)
        assert self.bands is not None
        parts = [
            read_image(path, wanted, window=patch.window) for path, wanted in patch.scene.parts(self.bands)
        ]
        # Empty is what is empty in every band, in one file or in several.
        empty = [part.valid for part in parts if part.valid is not None]
        valid = np.logical_or.reduce(empty) if len(empty) == len(parts) else None
        return ImageData(np.concatenate([part.pixels for part in parts]), valid)

    def read_mask(self, index: int) -> np.ndarray:
        patch = self.pairs[index]
        if not isinstance(patch, Patch):
            return super().read_mask(index)
        raw = read_mask(patch.mask, colors=False, window=patch.window)
        return SCENES.encode(raw, source=_place(patch.mask, patch.window))

    def source_of(self, index: int) -> str:
        patch = self.pairs[index]
        return _place(patch.image, patch.window) if isinstance(patch, Patch) else super().source_of(index)


# -------------------------------------------------------------------------------------------------- tiles


def _tiles(folder: Path, split: str) -> tuple[list[Pair], list[str]]:
    images = image_files(existing_folder(folder, L8Biome.name, "img_dir", split))
    masks = image_files(existing_folder(folder, L8Biome.name, "ann_dir", split))
    pairs, problems = match_pairs(images, masks, domain=L8Biome.name)
    # wetlands_LC81750732014035LGN00_patch_2048_2560.png
    return [
        Pair(pair.name, pair.image, pair.mask, _biome(pair.name.partition("_LC8")[0])) for pair in pairs
    ], problems


def _shared_with_val(folder: Path, split: str, pairs: Sequence[Pair]) -> tuple[str, ...]:
    """A published test set may be its validation set: kept, and said."""
    val = folder / "img_dir" / "val"
    if split != "test" or not val.is_dir():
        return ()
    shared = len({pair.name for pair in pairs} & image_files(val).keys())
    if not shared:
        return ()
    return (
        f"{shared} of {len(pairs)} test tiles are validation tiles, too. Of a checkpoint that was chosen on "
        "them, the figures are higher than on unseen images.",
    )


# ------------------------------------------------------------------------------------------------- scenes


def _scene_files(folder: Path) -> dict[str, dict[str, Path]]:
    """Scene -> part ("stack", "fixedmask", "b1" to "b11") -> file."""
    scenes: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.rglob("LC8*")):
        match = SCENE_FILE.fullmatch(path.name)
        if match and path.is_file():
            parts = scenes.setdefault(match[1], {})
            part = (match[2] or "stack").lower()
            if part in parts:
                raise ValueError(f"{path}: {parts[part]} is the same part of this scene; keep one of the two")
            parts[part] = path
    return scenes


def _patches(
    files: dict[str, dict[str, Path]], bands: Sequence[int], size: int
) -> tuple[list[Patch], list[str]]:
    """The labelled patches of all scenes, and one line for every scene that cannot be used."""
    patches: list[Patch] = []
    problems: list[str] = []
    for name, parts in sorted(files.items()):
        images = [path for part, path in parts.items() if part != "fixedmask"]
        mask = parts.get("fixedmask")
        if mask is None or not images:
            half = f"{mask}: the mask has no image" if mask else f"{images[0]}: the image has no mask"
            problems.append(f"{half}; a scene has {name}_fixedmask.TIF beside {name}.TIF or {name}_B4.TIF")
            continue
        scene = Scene(
            name,
            _biome(mask.parent.name, mask.parent.parent.name),
            mask,
            parts.get("stack"),
            {int(part[1:]): path for part, path in parts.items() if part.startswith("b")},
        )
        try:
            patches += _patches_of(scene, bands, size)
        except (OSError, ValueError) as error:
            problems.append(str(error))
    return patches, problems


def _patches_of(scene: Scene, bands: Sequence[int], size: int) -> Iterator[Patch]:
    height, width = read_size(scene.mask)
    parts = scene.parts(bands)
    for path, _ in parts:
        found = read_size(path)
        if found != (height, width):
            pan = scene.stack is None and path == scene.single.get(PANCHROMATIC)
            hint = " (band 8, panchromatic, has pixels of half the side: leave it out)" if pan else ""
            raise ValueError(
                f"{path}: the image is {found[0]}x{found[1]} pixels, its mask is {height}x{width}; they must "
                f"be equal{hint}"
            )
        count = count_bands(path)
        expected = BANDS if path == scene.stack else 1
        if count != expected:
            raise ValueError(
                f"{path}: has {count} bands, expected {expected}: a stack holds Landsat's bands 1 to "
                f"{BANDS} in order, any other file one band"
            )
    if min(height, width) < size:
        raise ValueError(
            f"{scene.mask}: {height}x{width} pixels hold no patch of {size}; choose a smaller "
            "--data-args.size"
        )
    changed = scene.mask.stat()
    for top, left in _labelled(scene.mask, size, (changed.st_mtime_ns, changed.st_size)):
        # Named by scene and place alone: the draw is the same for every copy of the set.
        yield Patch(
            f"{scene.name}_patch_{top}_{left}",
            parts[0][0],
            scene.mask,
            scene.domain,
            scene,
            Window(left, top, size, size),
        )


@lru_cache(maxsize=1024)  # train, val and test are drawn from the same scenes
def _labelled(mask: Path, size: int, stamp: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Upper left corners of the patches that hold any label. `stamp` tells a mask from what it was before.

    Reads the whole mask, one row of patches at a time, so that a wrong code is found before training starts.
    """
    height, width = read_size(mask)
    found: list[tuple[int, int]] = []
    for top in range(0, height - size + 1, size):
        window = Window(0, top, width // size * size, size)
        raw = read_mask(mask, colors=False, window=window)
        labelled = SCENES.encode(raw, source=_place(mask, window)) != IGNORE
        columns = np.flatnonzero(labelled.reshape(size, -1, size).any(axis=(0, 2)))
        found += [(top, int(column) * size) for column in columns]
    return tuple(found)


def _landsat_bands(bands: Sequence[int]) -> Sequence[int]:
    if not bands or not all(1 <= band <= BANDS for band in bands):
        raise ValueError(f"bands {list(bands)}: Landsat 8 has bands 1 to {BANDS}")
    return bands


def _biome(*names: str) -> str:
    """The first of `names` that is a biome, else the data set's own name."""
    return next((name for name in names if name in BIOMES), L8Biome.name)


def _place(path: Path, window: Window) -> str:
    rows = f"rows {window.row_off}-{window.row_off + window.height - 1}"
    return f"{path} ({rows}, columns {window.col_off}-{window.col_off + window.width - 1})"
