"""Reading images and masks as they really are: every band, any dtype, whatever the suffix claims.

The format is taken from the first bytes, because `.png` files with a JPEG inside are common. PNG and JPEG go
through Pillow, which refuses truncated files; everything else, and grey PNG of 2, 4 and 16 bits, goes through
rasterio, because Pillow silently drops bands beyond four and bits beyond eight, and stretches fewer bits.

An image comes with a validity mask where the file itself marks pixels as empty: alpha 0, a declared nodata
value in every band, or an internal mask. Alpha is never an image band unless `bands` asks for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from PIL import Image
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8\xff"
PNG_BIT_DEPTH_AT, PNG_COLOR_TYPE_AT, PNG_GREY = 24, 25, 0


@dataclass(frozen=True)
class ImageData:
    """pixels: (C, H, W) in the file's dtype; valid: (H, W) bool, or None where every pixel is data."""

    pixels: np.ndarray
    valid: np.ndarray | None


def read_image(
    path: str | Path, bands: Sequence[int] | None = None, *, window: Window | None = None
) -> ImageData:
    """Read an image of any format and band count.

    bands: 1-based indices into the file, in the order wanted (an alpha band counts); None = all but alpha.
    window: the part to read, within the image; memory holds no more than that of the file's pixels.
    Raises FileNotFoundError, or ValueError for a file that cannot be read to its end, a band that it does
    not have, and NaN or infinite pixels that it does not declare as nodata.
    """
    path = _existing(path)
    if window is None and _suits_pillow(path):
        pixels, valid = _read_with_pillow(path, bands)
    else:
        pixels, valid = _read_with_rasterio(path, bands, window)
    if pixels.dtype.kind == "f":
        finite = np.isfinite(pixels).all(0)
        bad = ~finite if valid is None else ~finite & valid
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise ValueError(
                f"{path}: {int(bad.sum())} pixels are NaN or infinite, first at row {row}, column {column}; "
                "fill them, or declare NaN as the file's nodata value to have them ignored"
            )
        if not finite.all():
            pixels = np.where(finite, pixels, pixels.dtype.type(0))
    elif pixels.dtype.kind not in "iu":
        raise ValueError(f"{path}: pixels of type {pixels.dtype} are not supported; use integers or floats")
    return ImageData(pixels, valid)


def read_mask(path: str | Path, *, colors: bool, window: Window | None = None) -> np.ndarray:
    """Read a label file: (H, W) values, or (H, W, 3) colours.

    A palette image holds both an index and a colour per pixel; `colors` says which of them is the label.
    `window` is the part to read, as for `read_image`.
    Alpha is dropped. Nothing is mapped here: that is `LabelSchema.encode`.
    """
    path = _existing(path)
    if window is None and _suits_pillow(path):
        with _open_with_pillow(path) as image:
            if image.mode == "P" and not colors:
                return np.array(image)
            if image.mode in ("P", "RGBA", "CMYK", "YCbCr") or (image.mode == "PA" and colors):
                return np.array(image.convert("RGB"))
            if image.mode == "1":
                return np.array(image, dtype=np.uint8)
            array = np.array(image)
            return array[..., 0] if image.mode in ("LA", "PA") else array
    return _read_mask_with_rasterio(path, colors, window)


def read_size(path: str | Path) -> tuple[int, int]:
    """Height and width from the header alone."""
    path = _existing(path)
    if _suits_pillow(path):
        try:
            with Image.open(path) as image:
                return image.height, image.width
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(_unreadable(path, error)) from None
    with _open_with_rasterio(path) as source:
        return source.height, source.width


def count_bands(path: str | Path) -> int:
    """Bands of a raster, alpha included, from the header alone."""
    with _open_with_rasterio(_existing(path)) as source:
        return source.count


# ------------------------------------------------------------------------------------------------- Pillow


def _suits_pillow(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(PNG_COLOR_TYPE_AT + 1)
    if not head:
        raise ValueError(f"{path}: the file is empty; download or write it again")
    if head.startswith(PNG_SIGNATURE):
        if len(head) <= PNG_COLOR_TYPE_AT:
            return False
        depth = head[PNG_BIT_DEPTH_AT]
        # Pillow stretches grey of 2 and 4 bits to 0-255: labels 0-3 would read 0, 85, 170, 255.
        return depth <= 8 and not (head[PNG_COLOR_TYPE_AT] == PNG_GREY and depth in (2, 4))
    return head.startswith(JPEG_SIGNATURE)


def _open_with_pillow(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()  # a truncated file fails here
    except Image.DecompressionBombError:
        raise ValueError(
            f"{path}: has more pixels than Pillow opens ({2 * (Image.MAX_IMAGE_PIXELS or 0):,}); "
            "cut it into tiles, or convert it to GeoTIFF"
        ) from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(_unreadable(path, error)) from None
    return image


def _read_with_pillow(path: Path, bands: Sequence[int] | None) -> tuple[np.ndarray, np.ndarray | None]:
    with _open_with_pillow(path) as image:
        if image.mode in ("P", "PA"):
            image = image.convert("RGBA" if image.mode == "PA" or "transparency" in image.info else "RGB")
        elif image.mode == "CMYK":
            image = image.convert("RGB")
        elif image.mode == "1":
            image = image.convert("L")
        has_alpha = image.mode in ("LA", "RGBA")
        array = np.array(image)
    array = array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))
    valid = array[-1] > 0 if has_alpha else None
    if bands is None:
        return (array[:-1] if has_alpha else array), _or_none(valid)
    _check_bands(path, bands, len(array))
    return array[[band - 1 for band in bands]], _or_none(valid)


# ----------------------------------------------------------------------------------------------- rasterio


def _open_with_rasterio(path: Path) -> rasterio.DatasetReader:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)  # training tiles seldom are
            return rasterio.open(path)
    except RasterioError as error:
        raise ValueError(_unreadable(path, error)) from None


def _read_with_rasterio(
    path: Path, bands: Sequence[int] | None, window: Window | None
) -> tuple[np.ndarray, np.ndarray | None]:
    with _open_with_rasterio(path) as source:
        alpha = [i for i, meaning in enumerate(source.colorinterp, start=1) if meaning == ColorInterp.alpha]
        if bands is None:
            bands = [band for band in source.indexes if band not in alpha]
        _check_bands(path, bands, source.count)
        try:
            pixels = source.read(list(bands), window=window)
            valid = np.ones(pixels.shape[1:], bool)
            if alpha:
                valid &= source.read(alpha[0], window=window) > 0
            elif MaskFlags.per_dataset in source.mask_flag_enums[0]:
                valid &= source.dataset_mask(window=window) > 0
        except (RasterioError, MemoryError) as error:
            raise ValueError(_unreadable(path, error)) from None
        # Empty means empty in every band that is read: 0 in one band of three is a colour.
        nodata = [source.nodatavals[band - 1] for band in bands]
        if all(value is not None for value in nodata):
            empty = [
                np.isnan(band) if np.isnan(value) else band == value
                for band, value in zip(pixels, nodata, strict=True)
            ]
            valid &= ~np.logical_and.reduce(empty)
    return pixels, _or_none(valid)


def _read_mask_with_rasterio(path: Path, colors: bool, window: Window | None) -> np.ndarray:
    with _open_with_rasterio(path) as source:
        try:
            bands = source.read(window=window)
            table = source.colormap(1) if colors and source.count == 1 else None
        except ValueError:  # rasterio's way to say that there is no colour table
            table = None
        except RasterioError as error:
            raise ValueError(_unreadable(path, error)) from None
        meanings = source.colorinterp
    keep = [band for band, meaning in zip(bands, meanings, strict=True) if meaning != ColorInterp.alpha]
    if len(keep) not in (1, 3):
        raise ValueError(f"{path}: a mask has 1 band (values) or 3 (colours), not {len(keep)}")
    if len(keep) == 3:
        return np.stack(keep, axis=-1)
    if table is None:
        return keep[0]
    lookup = np.zeros((max(table) + 1, 3), np.uint8)
    for index, color in table.items():
        lookup[index] = color[:3]
    return lookup[keep[0]]


# ------------------------------------------------------------------------------------------------ messages


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return path


def _check_bands(path: Path, bands: Sequence[int], count: int) -> None:
    if not bands or any(not 1 <= band <= count for band in bands):
        raise ValueError(
            f"{path}: has bands 1-{count}, bands {list(bands)} were asked for (they count from 1)"
        )


def _unreadable(path: Path, error: BaseException) -> str:
    reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
    reason_line = reason[0].replace(f"{path}: ", "")
    return f"{path}: cannot be read as an image ({reason_line}); it may be truncated or of another format"


def _or_none(valid: np.ndarray | None) -> np.ndarray | None:
    return None if valid is None or valid.all() else valid
