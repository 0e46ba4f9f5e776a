"""Georeferenced rasters, a window at a time: a scene to read, and a map on the same grid to write.

Rasterio (GDAL) reads and writes; memory holds the windows asked for and GDAL's cache, never the raster.
C bands, h/w pixels of a window.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import rasterio
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning, RasterioIOError
from rasterio.io import DatasetReader, DatasetWriter
from rasterio.windows import Window

from rsmodels import files

BLOCK = 256  # side of the blocks of a map that is written
GDAL_CACHE_MB = 128  # GDAL's own default is a share of the machine's memory
SAMPLES = 5  # the range of a scene is judged from 5 x 5 windows
SAMPLE_SIDE = 64

Scale = float | Literal["auto"] | None


@contextmanager
def gdal() -> Iterator[None]:
    """GDAL with a small cache, and silent about a raster without georeference: its map has none either."""
    with rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE_MB), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


class Scene:
    """An open raster, the bands a model wants of it, and the linear map to the model's range of values.

    Args:
        path: any raster that GDAL opens.
        mean, std: of the pixel values that the model was trained on, one per band.
        bands: 1-based, in the model's order; None takes the first, with a warning where there are more.
        scale: factor for pixel values; "auto" stretches each band to `mean` and `std`; None leaves them, with
            a warning where they are far from what the model knows.

    Raises FileNotFoundError or ValueError where the raster cannot serve the model.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        bands: Sequence[int] | None = None,
        scale: Scale = None,
    ) -> None:
        self.path = path
        try:
            self.raster: DatasetReader = rasterio.open(path)
        except RasterioIOError as error:
            if not Path(path).exists():
                raise FileNotFoundError(f"{path}: no such file") from None
            raise ValueError(f"{path}: not a raster that GDAL can open ({_one_line(error)})") from None
        try:
            self.bands = self._choose_bands(len(mean), bands)
            self.gain, self.offset = self._scaling(np.array(mean), np.array(std), scale)
        except BaseException:
            self.raster.close()
            raise

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *_: object) -> None:
        self.raster.close()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.raster.height, self.raster.width

    def read(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
        """Pixels (C, h, w) float32 in the model's range, and which of them are valid, (h, w) bool.

        A pixel that is nodata, masked, transparent or not finite is not valid, and 0, as in training.
        """
        pixels, valid = self._raw(window)
        pixels = pixels * self.gain[:, None, None] + self.offset[:, None, None]
        return np.where(valid, pixels, np.float32(0)), valid

    def _raw(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
        try:
            pixels = self.raster.read(self.bands, window=window, out_dtype="float32")
            # A pixel that is nodata in some bands only is data, as in GDAL's dataset mask.
            mask = self.raster.read_masks(self.bands, window=window).any(axis=0)
        except RasterioIOError as error:
            raise ValueError(
                f"{self.path}: the pixels from row {window.row_off}, column {window.col_off} cannot be read "
                f"({_one_line(error.__cause__ or error)}): the file is damaged or incomplete"
            ) from None
        return pixels, mask & np.isfinite(pixels).all(axis=0)

    def _choose_bands(self, count: int, bands: Sequence[int] | None) -> list[int]:
        raster = self.raster
        chosen = list(bands or range(1, count + 1))
        if len(chosen) != count:
            raise ValueError(f"bands {chosen}: the model takes {count} bands, not {len(chosen)}")
        if not all(1 <= band <= raster.count for band in chosen):
            raise ValueError(
                f"{self.path}: has {raster.count} band{'s' * (raster.count > 1)}, the model takes bands "
                f"{', '.join(map(str, chosen))}; choose {count} with --bands (counted from 1, one may be "
                "repeated)"
            )
        if any(np.issubdtype(np.dtype(raster.dtypes[band - 1]), np.complexfloating) for band in chosen):
            raise ValueError(f"{self.path}: holds complex numbers; convert them to amplitudes first")
        images = sum(interpretation != ColorInterp.alpha for interpretation in raster.colorinterp)
        if bands is None and images > count:
            warnings.warn(
                f"{self.path}: has {images} bands, the first {count} are used; choose with --bands",
                stacklevel=3,
            )
        return chosen

    def _scaling(self, mean: np.ndarray, std: np.ndarray, scale: Scale) -> tuple[np.ndarray, np.ndarray]:
        """Gain and offset, float32, per band."""
        if isinstance(scale, int | float) and not 0 < abs(scale) < np.inf:
            raise ValueError(
                f"scale {scale:g}: expected a factor for the pixel values, other than 0, or 'auto'"
            )
        gain = np.full(len(mean), 1.0 if scale is None or scale == "auto" else scale)
        offset = np.zeros(len(mean))
        sample = self._sample()
        if sample.size:
            low, middle, high = np.percentile(sample, (2, 50, 98), axis=1)
            if scale == "auto":
                # The 2nd and 98th percentiles of a normal distribution: two standard deviations off its mean.
                # A band of one value has no range to stretch: it goes to the mean.
                varies = high > low
                gain = np.where(varies, 4 * std / np.where(varies, high - low, 1), 1)
                offset = np.where(varies, mean - 2 * std - low * gain, mean - middle)
            far = np.abs(middle * gain + offset - mean) > 4 * std
            # 0..1 where the model knows 0..255 is not far by that measure, but it is all but black.
            black = (high >= 0) & (high * gain < 0.05 * mean)
            if (far | black).any() and scale != "auto":
                worst = int(np.argmax(far | black))
                factor = "" if scale is None else f" times {scale:g}"
                warnings.warn(
                    f"{self.path}: band {self.bands[worst]} holds {low[worst]:g} to {high[worst]:g}{factor}, "
                    f"the model knows {mean[worst]:.4g} ± {std[worst]:.4g}; give --scale the factor between "
                    "the two, or auto",
                    stacklevel=3,
                )
        return gain.astype(np.float32), offset.astype(np.float32)

    def _sample(self) -> np.ndarray:
        """Valid pixels (C, N) of a few windows all over the scene."""
        height, width = self.size
        parts = []
        for top in np.unique(np.linspace(0, max(height - SAMPLE_SIDE, 0), SAMPLES, dtype=int)):
            for left in np.unique(np.linspace(0, max(width - SAMPLE_SIDE, 0), SAMPLES, dtype=int)):
                window = Window(left, top, min(SAMPLE_SIDE, width - left), min(SAMPLE_SIDE, height - top))
                pixels, valid = self._raw(window)
                parts.append(pixels[:, valid])
        return np.concatenate(parts, axis=1)


@contextmanager
def create_on_grid(path: str | Path, grid: DatasetReader, **options: Any) -> Iterator[DatasetWriter]:
    """A GeoTIFF with the size, CRS, transform, GCPs and RPCs of `grid`, made of 256-pixel blocks.

    It appears under its name when it is complete. Raises OSError naming it where it cannot be written.
    """
    gcps, gcp_crs = grid.gcps
    profile = {
        "driver": "GTiff",
        "height": grid.height,
        "width": grid.width,
        "crs": grid.crs,
        "transform": None if gcps else grid.transform,
        "tiled": True,
        "blockxsize": BLOCK,
        "blockysize": BLOCK,
        "compress": "deflate",
        "BIGTIFF": "IF_SAFER",
        **options,
    }
    with files.atomic_path(path) as temporary:
        try:
            with rasterio.open(temporary, "w", **profile) as target:
                if gcps:
                    target.gcps = gcps, gcp_crs
                if grid.rpcs:
                    target.rpcs = grid.rpcs
                yield target
        except RasterioIOError as error:
            free = shutil.disk_usage(temporary.parent).free / 2**20
            reason = _one_line(error.__cause__ or error)
            raise OSError(f"{path}: cannot be written ({reason}); {free:.0f} MiB are free there") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
