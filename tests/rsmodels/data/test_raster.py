"""Reading scenes window by window: bands, validity, ranges, and files that are not what they seem."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.enums import ColorInterp
from rasterio.windows import Window

from rsmodels.data.raster import Scene, create_on_grid, gdal

RASTERS = Path(__file__).resolve().parents[4] / "shared" / "data" / "rasters"
MEAN, STD = (120.0, 110.0, 100.0), (50.0, 50.0, 50.0)

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A GeoTIFF with the given pixels (C, H, W)."""

    def write_file(pixels: np.ndarray, name: str = "scene.tif", **options: object) -> Path:
        count, height, width = pixels.shape
        profile = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": pixels.dtype}
        with gdal(), rasterio.open(tmp_path / name, "w", **profile, **options) as target:
            target.write(pixels)
            if count == 4:
                target.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
        return tmp_path / name

    return write_file


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(1, 255, (3, 40, 50)).astype(np.uint8)


def read_all(path: Path, **options: object) -> tuple[np.ndarray, np.ndarray]:
    settings = {"mean": MEAN, "std": STD, **options}
    with gdal(), Scene(path, **settings) as scene:  # type: ignore[arg-type]
        return scene.read(Window(0, 0, scene.size[1], scene.size[0]))


def test_windows_hold_the_files_values(write: Write, pixels: np.ndarray) -> None:
    with gdal(), Scene(write(pixels), mean=MEAN, std=STD) as scene:
        assert scene.size == (40, 50)
        found, valid = scene.read(Window(10, 5, 20, 8))
    np.testing.assert_array_equal(found, pixels[:, 5:13, 10:30])
    assert found.dtype == np.float32 and valid.all()


def test_bands_are_picked_in_order(write: Write, pixels: np.ndarray) -> None:
    found, _ = read_all(write(pixels), bands=[3, 1, 3])
    np.testing.assert_array_equal(found, pixels[[2, 0, 2]])


def test_nodata_is_where_all_bands_say_so(write: Write, pixels: np.ndarray) -> None:
    pixels[:, :4] = 0
    pixels[0, 10] = 0
    found, valid = read_all(write(pixels, nodata=0))
    np.testing.assert_array_equal(~valid, np.arange(40)[:, None].repeat(50, 1) < 4)
    assert (found[:, :4] == 0).all()
    np.testing.assert_array_equal(found[1:, 10], pixels[1:, 10])


def test_alpha_nan_and_infinity_are_holes(write: Write) -> None:
    values = np.full((3, 10, 10), 100, np.float32)
    values[1, 2, 3], values[2, 4, 5] = np.nan, np.inf
    found, valid = read_all(write(values))
    assert sorted(map(tuple, np.argwhere(~valid))) == [(2, 3), (4, 5)]
    assert np.isfinite(found).all()
    rgba = np.full((4, 10, 10), 100, np.uint8)
    rgba[3, :5] = 0
    _, valid = read_all(write(rgba, "rgba.tif"))
    assert not valid[:5].any() and valid[5:].all()


def test_scale_multiplies(write: Write, pixels: np.ndarray) -> None:
    found, _ = read_all(write(pixels.astype(np.uint16) * 100), scale=0.01)
    np.testing.assert_allclose(found, pixels, rtol=1e-6)


@pytest.mark.parametrize("scale", (0, float("nan"), float("inf")))
def test_a_scale_that_leaves_nothing_of_the_image(write: Write, pixels: np.ndarray, scale: float) -> None:
    with pytest.raises(ValueError, match=f"scale {scale:g}: expected a factor"):
        read_all(write(pixels), scale=scale)


def test_auto_scale_meets_the_models_statistics(write: Write) -> None:
    rng = np.random.default_rng(0)
    reflectance = rng.normal((3000, 500, 1200), (400, 50, 300), (60, 60, 3)).transpose(2, 0, 1)
    found, _ = read_all(write(reflectance.astype(np.int16)), scale="auto")
    np.testing.assert_allclose(found.mean((1, 2)), MEAN, atol=5)
    np.testing.assert_allclose(found.std((1, 2)), STD, rtol=0.1)


def test_auto_scale_leaves_a_band_of_one_value_finite(write: Write) -> None:
    scene = np.zeros((3, 60, 60), np.uint8)
    scene[:, 30, 30] = 200  # outside the percentiles: no range to stretch
    found, _ = read_all(write(scene), scale="auto")
    np.testing.assert_allclose(found[:, 0, 0], MEAN, rtol=1e-5)
    np.testing.assert_allclose(found[:, 30, 30], np.array(MEAN) + 200, rtol=1e-5)


@pytest.mark.parametrize(("values", "kind"), [((2000, 4000), np.uint16), ((0.05, 0.4), np.float32)])
def test_another_range_is_warned_of(write: Write, values: tuple[float, float], kind: type) -> None:
    scene = np.random.default_rng(0).uniform(*values, (3, 30, 30)).astype(kind)
    with pytest.warns(
        UserWarning, match=r"scene.tif: band 1 holds .* the model knows 120 ± 50; give --scale"
    ):
        read_all(write(scene))


def test_an_ordinary_scene_raises_no_warning(write: Write, pixels: np.ndarray) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_all(write(pixels))
        read_all(write(pixels // 4, "dark.tif"))


def test_more_bands_than_the_model_takes_are_warned_of(write: Write, pixels: np.ndarray) -> None:
    eight = np.concatenate([pixels, pixels, pixels[:2]])
    path = write(eight)
    with pytest.warns(UserWarning, match="has 8 bands, the first 3 are used"):
        read_all(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_all(path, bands=[5, 3, 2])


@pytest.mark.parametrize(
    ("bands", "message"),
    [
        (None, "has 1 band, the model takes bands 1, 2, 3"),
        ([1, 1, 2], "has 1 band, the model takes bands 1, 1, 2"),
        ([1, 1], r"bands \[1, 1\]: the model takes 3 bands, not 2"),
    ],
)
def test_bands_that_do_not_fit(
    write: Write, pixels: np.ndarray, bands: list[int] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_all(write(pixels[:1]), bands=bands)


def test_complex_numbers_are_refused(write: Write) -> None:
    with pytest.raises(ValueError, match="complex numbers"):
        read_all(write(np.ones((3, 8, 8), np.complex64)))


def test_files_that_are_no_rasters(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.tif: no such file"):
        read_all(tmp_path / "nowhere.tif")
    (tmp_path / "text.tif").write_text("hello")
    with pytest.raises(ValueError, match=r"text.tif: not a raster that GDAL can open"):
        read_all(tmp_path / "text.tif")


def test_a_truncated_file_is_named(write: Write, pixels: np.ndarray) -> None:
    path = write(
        np.random.default_rng(0).integers(0, 255, (3, 300, 300)).astype(np.uint8), compress="deflate"
    )
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"scene.tif: .*damaged or incomplete") as caught:
        read_all(path)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not RASTERS.is_dir(), reason=f"{RASTERS} is absent")
def test_validity_is_gdals_dataset_mask() -> None:
    for name in ("RGB.byte.tif", "RGBA.uint16.tif", "cog_rgb_mask.tif", "cog_uint8_rgb_mask.tif"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, valid = read_all(RASTERS / name)
        with rasterio.open(RASTERS / name) as source:
            np.testing.assert_array_equal(valid, source.dataset_mask() > 0, err_msg=name)


def test_an_interrupted_file_never_appears(write: Write, pixels: np.ndarray, tmp_path: Path) -> None:
    with (
        gdal(),
        rasterio.open(write(pixels)) as grid,
        pytest.raises(KeyboardInterrupt),
        create_on_grid(tmp_path / "out.tif", grid, count=1, dtype="uint8", nodata=255),
    ):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["scene.tif"]
