"""Reading files that are not what their names say, have more than Pillow sees, or are broken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.enums import ColorInterp
from rasterio.transform import from_origin
from rasterio.windows import Window

from rsmodels.data.io import count_bands, read_image, read_mask, read_size

RASTERS = Path(__file__).parents[4] / "shared" / "data"
needs_rasters = pytest.mark.skipif(not RASTERS.is_dir(), reason=f"no real rasters at {RASTERS}")


@pytest.fixture
def rgb() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)


def write_tif(path: Path, bands: np.ndarray, **profile) -> Path:
    with rasterio.open(
        path, "w", driver="GTiff", count=len(bands), height=bands.shape[1], width=bands.shape[2],
        dtype=bands.dtype,
        transform=from_origin(0, 9, 1, 1), **profile,
    ) as target:  # fmt: skip
        target.write(bands)
    return path


def test_a_png_comes_as_bands_first(tmp_path, rgb):
    Image.fromarray(rgb).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.valid is None
    assert np.array_equal(image.pixels, rgb.transpose(2, 0, 1))
    assert read_size(tmp_path / "a.png") == (9, 7)


def test_a_jpeg_with_the_name_of_a_png_is_read(tmp_path, rgb):
    Image.fromarray(rgb).save(tmp_path / "a.jpg", quality=95)
    (tmp_path / "a.jpg").rename(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").pixels.shape == (3, 9, 7)


def test_alpha_is_dropped_and_empty_where_it_is_0(tmp_path, rgb):
    alpha = np.full((9, 7, 1), 255, np.uint8)
    alpha[2, 3] = 0
    Image.fromarray(np.concatenate([rgb, alpha], 2)).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.pixels.shape == (3, 9, 7)
    assert image.valid is not None
    assert np.argwhere(~image.valid).tolist() == [[2, 3]]
    assert read_image(tmp_path / "a.png", [4]).pixels[0].tolist() == alpha[..., 0].tolist()


def test_bands_pick_and_order(tmp_path):
    bands = np.arange(8 * 4, dtype=np.uint16).reshape(8, 2, 2) * 1000
    path = write_tif(tmp_path / "ms.tif", bands)
    assert np.array_equal(read_image(path).pixels, bands)
    assert np.array_equal(read_image(path, [8, 1, 3]).pixels, bands[[7, 0, 2]])


@pytest.mark.parametrize("wrong", [[0], [4], [1, 9], []])
def test_bands_that_a_file_does_not_have(tmp_path, rgb, wrong):
    path = write_tif(tmp_path / "a.tif", rgb.transpose(2, 0, 1))
    Image.fromarray(rgb).save(tmp_path / "a.png")
    for file in (path, tmp_path / "a.png"):
        with pytest.raises(ValueError, match=r"has bands 1-3, bands .* count from 1"):
            read_image(file, wrong)


def test_sixteen_bit_png_keeps_its_bits(tmp_path):
    bands = np.array([[[1, 257], [4000, 65535]]] * 3, np.uint16)
    with rasterio.open(
        tmp_path / "a.png", "w", driver="PNG", count=3, height=2, width=2, dtype="uint16"
    ) as target:
        target.write(bands)
    assert np.array_equal(read_image(tmp_path / "a.png").pixels, bands)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_png_of_few_bits_keeps_its_values(tmp_path, bits):
    values = np.arange(2**bits, dtype=np.uint8)[None]
    profile = {"driver": "PNG", "count": 1, "height": 1, "width": 2**bits, "dtype": "uint8", "nbits": bits}
    with rasterio.open(tmp_path / "a.png", "w", **profile) as target:
        target.write(values[None])
    assert np.array_equal(read_mask(tmp_path / "a.png", colors=False), values)


def test_a_pixel_is_empty_only_where_every_band_is_nodata(tmp_path):
    bands = np.full((3, 2, 2), 50, np.uint8)
    bands[:, 0, 0] = 0
    bands[0, 1, 1] = 0
    image = read_image(write_tif(tmp_path / "a.tif", bands, nodata=0))
    assert image.valid is not None
    assert image.valid.tolist() == [[False, True], [True, True]]


def test_an_internal_mask_marks_empty_pixels(tmp_path):
    path = write_tif(tmp_path / "a.tif", np.full((3, 2, 2), 7, np.uint8))
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as target:
        target.write_mask(np.array([[255, 0], [255, 255]], np.uint8))
    image = read_image(path)
    assert image.valid is not None
    assert image.valid.tolist() == [[True, False], [True, True]]


def test_a_window_is_that_part_of_the_image(tmp_path, rgb):
    window = Window(2, 1, 3, 4)
    rows, columns = slice(1, 5), slice(2, 5)
    alpha = np.full((1, *rgb.shape[:2]), 255, np.uint8)
    alpha[0, 2, 3] = 0
    bands = np.concatenate([rgb.transpose(2, 0, 1), alpha])
    nodata = write_tif(tmp_path / "b.tif", np.where(alpha > 0, bands[:3], 0), nodata=0)
    Image.fromarray(bands.transpose(1, 2, 0)).save(tmp_path / "c.png")
    rgba = write_tif(tmp_path / "a.tif", bands, photometric="RGB", alpha="YES")
    for path in (rgba, nodata, tmp_path / "c.png"):
        whole, part = read_image(path), read_image(path, window=window)
        np.testing.assert_array_equal(part.pixels, whole.pixels[:, rows, columns])
        np.testing.assert_array_equal(part.valid, whole.valid[rows, columns])
    index = rgb[..., 0] % 4  # the palette has four colours
    mask = palette_png(tmp_path / "m.png", index)
    np.testing.assert_array_equal(read_mask(mask, colors=False, window=window), index[rows, columns])
    assert (count_bands(rgba), count_bands(nodata)) == (4, 3)


def test_undeclared_nan_is_an_error_that_says_where(tmp_path):
    bands = np.ones((2, 3, 3), np.float32)
    bands[1, 2, 0] = np.nan
    path = write_tif(tmp_path / "a.tif", bands)
    with pytest.raises(ValueError, match=r"a\.tif: 1 pixels are NaN or infinite, first at row 2, column 0"):
        read_image(path)


def test_declared_nan_is_nodata(tmp_path):
    bands = np.ones((1, 2, 2), np.float32)
    bands[0, 0, 1] = np.nan
    image = read_image(write_tif(tmp_path / "a.tif", bands, nodata=np.nan))
    assert image.valid is not None
    assert image.valid.tolist() == [[True, False], [True, True]]
    assert np.isfinite(image.pixels).all()


def test_nan_in_one_band_of_two_is_still_an_error(tmp_path):
    bands = np.ones((2, 2, 2), np.float32)
    bands[0, 0, 1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        read_image(write_tif(tmp_path / "a.tif", bands, nodata=np.nan))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path, name):
    path = tmp_path / name
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for read in (read_image, lambda file: read_mask(file, colors=True)):
        with pytest.raises(ValueError, match=rf"{name}: cannot be read as an image .*truncated") as error:
            read(path)
        assert "\n" not in str(error.value)


def test_files_that_are_no_images(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.tif").write_text("hello, this is no image at all")
    with pytest.raises(ValueError, match=r"empty\.png: the file is empty"):
        read_image(tmp_path / "empty.png")
    with pytest.raises(ValueError, match=r"text\.tif: cannot be read as an image"):
        read_image(tmp_path / "text.tif")
    with pytest.raises(FileNotFoundError, match=r"none\.png: no such file"):
        read_image(tmp_path / "none.png")


def palette_png(path: Path, index: np.ndarray) -> Path:
    image = Image.fromarray(index.astype(np.uint8)).convert("P")
    image.putdata(index.ravel().tolist())
    image.putpalette([0, 0, 0, 255, 0, 0, 10, 20, 30, 40, 50, 60])
    image.save(path)
    return path


def test_a_palette_mask_has_an_index_and_a_colour(tmp_path):
    index = np.array([[1, 2], [3, 0]])
    path = palette_png(tmp_path / "m.png", index)
    assert np.array_equal(read_mask(path, colors=False), index)
    assert read_mask(path, colors=True)[0].tolist() == [[255, 0, 0], [10, 20, 30]]


def test_a_palette_tif_has_them_too(tmp_path):
    index = np.array([[[1, 2], [1, 0]]], np.uint8)
    path = write_tif(tmp_path / "m.tif", index)
    with rasterio.open(path, "r+") as target:
        target.write_colormap(1, {0: (0, 0, 0, 255), 1: (9, 8, 7, 255), 2: (1, 2, 3, 255)})
    assert np.array_equal(read_mask(path, colors=False), index[0])
    assert read_mask(path, colors=True)[0].tolist() == [[9, 8, 7], [1, 2, 3]]


def test_the_alpha_of_a_colour_mask_is_dropped(tmp_path, rgb):
    Image.fromarray(rgb).convert("RGBA").save(tmp_path / "m.png")
    assert np.array_equal(read_mask(tmp_path / "m.png", colors=True), rgb)
    path = write_tif(tmp_path / "m.tif", np.concatenate([rgb, rgb[..., :1]], 2).transpose(2, 0, 1))
    with rasterio.open(path, "r+") as target:
        target.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
    assert np.array_equal(read_mask(path, colors=True), rgb)


def test_a_grey_mask_without_a_colour_table(tmp_path):
    values = np.array([[[0, 300], [-1, 2]]], np.int16)
    path = write_tif(tmp_path / "m.tif", values)
    assert np.array_equal(read_mask(path, colors=False), values[0])
    assert np.array_equal(read_mask(path, colors=True), values[0])


def test_a_one_bit_mask_is_0_and_1(tmp_path):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png", colors=False).tolist() == [[1, 0]]


def test_a_mask_of_two_bands_is_refused(tmp_path):
    path = write_tif(tmp_path / "m.tif", np.zeros((2, 2, 2), np.uint8))
    with pytest.raises(ValueError, match=r"1 band .* or 3"):
        read_mask(path, colors=False)


@needs_rasters
def test_real_rasters():
    scene = read_image(RASTERS / "rasters/RGB.byte.tif")
    assert scene.pixels.shape == (3, 718, 791)
    assert scene.valid is not None
    assert 0.25 < (~scene.valid).mean() < 0.45
    assert read_image(RASTERS / "rasters/RGBA.uint16.tif").pixels.dtype == np.uint16
    assert read_image(RASTERS / "torchsat/tiff_8channel_uint8.tif").pixels.shape[0] == 8
    assert read_image(RASTERS / "sen1floods11/Spain_7370579_S2Hand.tif", [4, 3, 2]).pixels.shape == (
        3,
        512,
        512,
    )
    assert read_image(RASTERS / "rasters/all-nodata.tif").valid.any() == np.False_
    with pytest.raises(ValueError, match=r"corrupt\.tif: cannot be read"):
        read_image(RASTERS / "rasters/corrupt.tif")
