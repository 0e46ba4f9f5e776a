"""A synthetic scene as a georeferenced GeoTIFF, for trying `predict` on something larger than a tile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import rasterio
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.transform import from_origin

from rsmodels.data.base import SPLITS
from rsmodels.data.schema import IGNORE, LabelSchema
from rsmodels.data.synthetic.dataset import as_domain, raw_labels, synthetic_schema
from rsmodels.data.synthetic.domains import BANDS, PLATFORMS, Domain
from rsmodels.data.synthetic.scene import render_scene
from rsmodels.files import atomic_path

NODATA = 0  # the renderer leaves 0 free
SCENE_SPLIT = len(SPLITS)  # a stream of its own: no tile of train, val or test shows the same place
CRS_NAME = "EPSG:32633"
ORIGIN = (400_000.0, 5_400_000.0)  # easting and northing of the upper left corner
BLOCK = 256
BAND_NAMES = ("red", "green", "blue", "infrared")
COLOR_INTERP = {"red": ColorInterp.red, "green": ColorInterp.green, "blue": ColorInterp.blue}


def write_scene(
    path: str | Path,
    size: int = 2048,
    *,
    seed: int = 0,
    domain: Domain | str | None = None,
    classes: str | Sequence[str] | None = None,
    nodata_share: float = 0.08,
) -> Path:
    """Write one seamless scene of `size` x `size` pixels and its label; returns the label's path.

    path: a tiled, compressed GeoTIFF in UTM with nodata 0. The label, `NAME_label.tif` beside it, holds train
          ids (255 = no data) and a colour table.
    nodata_share: share of the scene that two opposite corners without data take, as a swath leaves them.
    """
    if not 0 <= nodata_share < 0.5:
        raise ValueError(f"nodata_share {nodata_share} is not between 0 and 0.5")
    if size < BLOCK:
        raise ValueError(
            f"size {size}: a scene is at least {BLOCK} pixels wide; use SyntheticEarth for tiles"
        )
    path, domain, schema = Path(path), as_domain(domain), synthetic_schema(classes)
    scene = render_scene((seed, SCENE_SPLIT, 0), size, domain)
    empty = _swath_corners(size, nodata_share)
    image = np.where(empty, np.uint8(NODATA), scene.image)
    ids = schema.encode(raw_labels(scene, schema), source=str(path))
    ids[empty] = IGNORE

    gsd = PLATFORMS[domain.platform].gsd
    profile = {
        "driver": "GTiff", "width": size, "height": size, "dtype": "uint8",
        "crs": CRS.from_user_input(CRS_NAME),
        "transform": from_origin(*ORIGIN, gsd, gsd), "tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK,
        "compress": "deflate",
    }  # fmt: skip
    bands = [BAND_NAMES[band] for band in BANDS[domain.bands]]
    with (
        atomic_path(path) as temporary,
        rasterio.open(temporary, "w", count=len(bands), nodata=NODATA, **profile) as target,
    ):
        target.colorinterp = [COLOR_INTERP.get(name, ColorInterp.undefined) for name in bands]
        target.write(image)
        for number, name in enumerate(bands, start=1):
            target.set_band_description(number, name)
    label_path = path.with_name(f"{path.stem}_label.tif")
    with (
        atomic_path(label_path) as temporary,
        rasterio.open(temporary, "w", count=1, nodata=IGNORE, **profile) as target,
    ):
        target.write(ids, 1)
        target.write_colormap(1, _color_table(schema))
        target.update_tags(classes=",".join(schema.classes))
    return label_path


def _swath_corners(size: int, share: float) -> np.ndarray:
    """Two right triangles, upper left and lower right, that cover `share` of the square."""
    # Each has the legs 2r and r/2 (as shares of the side), so both together cover r squared.
    r = np.sqrt(share)
    position = (np.arange(size) + 0.5) / size
    x, y = position[None, :], position[:, None]
    if share == 0:
        return np.zeros((size, size), bool)
    upper = x / (r / 2) + y / (2 * r) < 1
    return upper | upper[::-1, ::-1]


def _color_table(schema: LabelSchema) -> dict[int, tuple[int, int, int, int]]:
    table = {index: (*color, 255) for index, color in enumerate(schema.palette)}
    return table | {IGNORE: (0, 0, 0, 0)}
