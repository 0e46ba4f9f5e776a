"""Prediction of whole rasters: same grid, same holes, no seams, bounded memory, nothing half-written."""

from __future__ import annotations

import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.rpc import RPC
from torch import Tensor

import rsmodels
import rsmodels.predict
from rsmodels.data.raster import gdal
from rsmodels.predict import predict

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"


def read(path: Path) -> np.ndarray:
    with gdal(), rasterio.open(path) as source:
        return source.read()


def assert_same_grid(output: Path, scene: Path) -> None:
    with gdal(), rasterio.open(output) as ours, rasterio.open(scene) as theirs:
        assert ours.driver == "GTiff"
        assert (ours.width, ours.height) == (theirs.width, theirs.height)
        assert ours.crs == theirs.crs
        assert ours.transform == theirs.transform
        assert ours.gcps == theirs.gcps or [p.asdict() for p in ours.gcps[0]] == [
            p.asdict() for p in theirs.gcps[0]
        ]
        assert (ours.rpcs is None) == (theirs.rpcs is None)


# ---------------------------------------------------------------------------------------- what is written


def test_the_map_is_a_tiled_palette_geotiff(
    tmp_path: Path, use: Callable, pixel_model: Any, random_scene: Any
) -> None:
    scene = random_scene(70, 90)
    returned = rsmodels.predict(
        scene,
        model="any",
        output=tmp_path / "new" / "map.tif",
        probabilities=tmp_path / "p.tif",
        device="cpu",
    )
    assert returned == tmp_path / "new" / "map.tif"
    assert_same_grid(returned, scene)
    with rasterio.open(returned) as written:
        assert written.dtypes == ("uint8",) and written.nodata == 255
        assert written.profile["tiled"] and written.compression.name == "deflate"
        assert written.tags(1) == {f"class_{index}": name for index, name in enumerate(pixel_model.classes)}
        table = written.colormap(1)
        assert tuple(table[index][:3] for index in range(4)) == pixel_model.palette
        assert table[255][3] == 0
    with rasterio.open(tmp_path / "p.tif") as written:
        assert written.dtypes == ("float32",) * 4 and np.isnan(written.nodata)
        assert written.descriptions == pixel_model.classes
        shares = written.read()
    np.testing.assert_allclose(shares.sum(0), 1, atol=1e-5)
    np.testing.assert_array_equal(shares.argmax(0), read(returned)[0])


@pytest.mark.parametrize(
    "transform",
    [
        Affine(2.0, 0, 500_000, 0, -2.0, 5_000_000),
        Affine(2.0, 0, 500_000, 0, 2.0, 5_000_000),
        Affine(17.320508, 5.0, 100, 10.0, -8.660254, 200),
        Affine(1.5, 0.25, 7e5, -0.5, -1.5, 4e6),
    ],
    ids=["north-up", "south-up", "rotated", "sheared"],
)
def test_the_grid_is_kept(tmp_path: Path, use: Callable, transform: Affine, random_scene: Any) -> None:
    scene = random_scene(40, 50, transform=transform)
    assert_same_grid(predict(scene, model="any", output=tmp_path / "map.tif"), scene)


def test_ground_control_points_and_rpcs_are_kept(tmp_path: Path, use: Callable, random_scene: Any) -> None:
    scene = random_scene(40, 50, crs=None, transform=None)
    points = [
        GroundControlPoint(row, col, 10 + col / 10, 50 - row / 10) for row in (0, 40) for col in (0, 50)
    ]
    coefficients = [float(index) for index in range(20)]
    with gdal(), rasterio.open(scene, "r+") as target:
        target.gcps = points, CRS.from_epsg(4326)
        target.rpcs = RPC(
            height_off=1, height_scale=2, lat_off=3, lat_scale=4, line_off=5, line_scale=6, long_off=7,
            long_scale=8, samp_off=9, samp_scale=10, line_num_coeff=coefficients, line_den_coeff=coefficients,
            samp_num_coeff=coefficients, samp_den_coeff=coefficients,
        )  # fmt: skip
    output = predict(scene, model="any", output=tmp_path / "map.tif")
    with gdal(), rasterio.open(output) as ours, rasterio.open(scene) as theirs:
        assert len(ours.gcps[0]) == 4 and ours.gcps[1] == theirs.gcps[1]
        assert [(p.row, p.col, p.x, p.y) for p in ours.gcps[0]] == [(p.row, p.col, p.x, p.y) for p in points]
        assert ours.rpcs.to_dict() == theirs.rpcs.to_dict()


def test_holes_stay_holes(
    tmp_path: Path, use: Callable, write_scene: Any, random_pixels: Any, pixel_model: Any
) -> None:
    pixels = random_pixels(100, 120)
    pixels[:, 20:60, 30:90] = 0
    scene = write_scene(pixels, nodata=0)
    predict(scene, model="any", output=tmp_path / "map.tif", probabilities=tmp_path / "p.tif")
    hole = (pixels == 0).all(0)
    found = read(tmp_path / "map.tif")[0]
    np.testing.assert_array_equal(found == 255, hole)
    np.testing.assert_array_equal(np.isnan(read(tmp_path / "p.tif")).all(0), hole)
    np.testing.assert_array_equal(found[~hole], pixel_model().answer(pixels).argmax(0)[~hole])


def test_a_scene_of_nodata_gives_a_map_of_nodata_and_a_line(
    tmp_path: Path, use: Callable, write_scene: Any, pixel_model: Any
) -> None:
    class Never(pixel_model):
        def forward(self, images: Tensor) -> Tensor:
            raise AssertionError("there is nothing to look at")

    use(Never())
    scene = write_scene(np.zeros((3, 100, 40), np.uint8), nodata=0)
    with pytest.warns(UserWarning, match=r"scene.tif: every pixel is nodata"):
        predict(scene, model="any", output=tmp_path / "map.tif")
    assert (read(tmp_path / "map.tif") == 255).all()


def test_a_binary_model_writes_two_classes_and_one_probability(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_scene: Any, random_pixels: Any, pixel_model: Any
) -> None:
    class Roads(pixel_model):
        num_classes = 1

        def forward(self, images: Tensor) -> Tensor:
            return images[:, :1] * 5

        def probabilities(self, logits: Tensor) -> Tensor:
            return logits.sigmoid()

    info = {"model": "fake", "classes": ["background", "road"], "palette": [[0, 0, 0], [255, 255, 255]]}
    monkeypatch.setattr("rsmodels.predict.load_model", lambda *_, **__: (Roads(), info))
    pixels = random_pixels(50, 60)
    scene = write_scene(pixels)
    predict(scene, model="any", output=tmp_path / "map.tif", probabilities=tmp_path / "p.tif")
    np.testing.assert_array_equal(read(tmp_path / "map.tif")[0], pixels[0] >= 120)
    with rasterio.open(tmp_path / "p.tif") as written:
        assert written.count == 1 and written.descriptions == ("road",)


# ---------------------------------------------------------------------------------------- tiles and seams


def test_the_tile_size_is_the_models_input(tmp_path: Path, saved: Path, random_scene: Any) -> None:
    scene = random_scene(100, 100)
    predict(scene, model=saved, output=tmp_path / "map.tif", tile=96)
    assert_same_grid(tmp_path / "map.tif", scene)
    with pytest.raises(ValueError, match=r"^tile 50: expected a positive multiple of 32, in pixels$"):
        predict(scene, model=saved, output=tmp_path / "other.tif", tile=50)


@settings(max_examples=25)
@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    tile=st.tuples(st.integers(8, 40), st.integers(8, 40)),
    overlap=st.floats(0, 0.7),
    batch_size=st.integers(1, 9),
)
def test_tiles_leave_no_trace(
    tmp_path: Path,
    use: Callable,
    size: tuple[int, int],
    tile: tuple[int, int],
    overlap: float,
    batch_size: int,
    write_scene: Any,
    random_pixels: Any,
    pixel_model: Any,
) -> None:
    """A model that looks at single pixels says the same whatever the tiles, as for the whole image."""
    model = pixel_model(tile)
    use(model)
    pixels = random_pixels(*size)
    scene = write_scene(pixels)
    predict(scene, model="any", output=tmp_path / "map.tif", overlap=overlap, batch_size=batch_size)
    logits = model.answer(pixels)
    found = read(tmp_path / "map.tif")[0]
    top_two = np.sort(logits, axis=0)[-2:]
    clear = top_two[1] - top_two[0] > 1e-4
    np.testing.assert_array_equal(found[clear], logits.argmax(0)[clear])


def test_neighbouring_tiles_are_blended(
    tmp_path: Path, use: Callable, pixel_model: Any, random_scene: Any
) -> None:
    """A ramp over each tile jumps at its border, unless tiles cross-fade."""

    class RampModel(pixel_model):
        """Sees only where in the tile a pixel is: its first class grows from left to right, 0 to 1."""

        def forward(self, images: Tensor) -> Tensor:
            batch, _, height, width = images.shape
            ramp = torch.linspace(0, 1, width).expand(batch, 1, height, width)
            return torch.cat([ramp, 1 - ramp, torch.zeros(batch, 2, height, width)], 1)

        def probabilities(self, logits: Tensor) -> Tensor:
            return logits

    use(RampModel())
    scene = random_scene(32, 192)

    def steepest(overlap: float) -> float:
        predict(
            scene, model="any", output=tmp_path / "m.tif", probabilities=tmp_path / "p.tif", overlap=overlap
        )
        return float(np.abs(np.diff(read(tmp_path / "p.tif")[0], axis=1)).max())

    assert steepest(0.0) > 0.9
    assert steepest(0.25) < 0.3
    assert steepest(0.5) < 0.1


@pytest.mark.parametrize("height", [600, 3600])
def test_memory_depends_on_tiles_not_on_the_scene(
    tmp_path: Path, use: Callable, height: int, pixel_model: Any, random_scene: Any
) -> None:
    """Numpy's and torch's blocks alike stay far below what the whole scene would take."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                self.numbers = max(self.numbers, result.numel())
            return result

    scene = random_scene(height, 64, tiled=True, blockxsize=64, blockysize=64)
    use(pixel_model((64, 64)))
    largest = Largest()
    tracemalloc.start()
    try:
        with largest:
            predict(scene, model="any", output=tmp_path / "map.tif", probabilities=tmp_path / "p.tif")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # One row of tiles and a block: (4 classes + validity) x (64 + 256) rows x 64 columns.
    assert largest.numbers <= 5 * (64 + 256) * 64
    assert peak < 3e6


# ------------------------------------------------------------------------------------------- real rasters


def rasters() -> list[Path]:
    return sorted(
        path for folder in ("rasters", "torchsat", "sen1floods11") for path in (DATA / folder).glob("*.tif")
    )


@pytest.mark.skipif(not rasters(), reason=f"{DATA} is absent")
@pytest.mark.parametrize("scene", rasters(), ids=lambda path: path.name)
def test_real_rasters(tmp_path: Path, use: Callable, saved: Path, scene: Path, pixel_model: Any) -> None:
    output = tmp_path / "map.tif"
    with gdal(), rasterio.open(scene) as source:
        bands = None if source.count >= 3 else [1, 1, 1]
    use(pixel_model((256, 256)))
    if scene.name == "RGB.byte.tif":  # one of them by a real model
        use(rsmodels.load_model(saved, image_size=128)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if scene.name == "corrupt.tif":
            with pytest.raises(ValueError, match=r"corrupt.tif: the pixels .* cannot be read"):
                predict(scene, model=saved, output=output)
            assert not list(tmp_path.iterdir())
            return
        predict(scene, model=saved, output=output, bands=bands, overlap=0.1)
    assert_same_grid(output, scene)
    with gdal(), rasterio.open(scene) as source, rasterio.open(output) as written:
        used = [1] if bands else [1, 2, 3]
        valid = np.isfinite(source.read(used)).all(0) & source.read_masks(used).any(0)
        assert written.nodata == 255
        np.testing.assert_array_equal(written.dataset_mask() > 0, valid)
        assert set(np.unique(written.read(1))) <= {0, 1, 2, 3, 255}
