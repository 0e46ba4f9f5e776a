"""`rsmodels features`: the pictures of scenes, folders and data sets, and what stops it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from rsmodels.cli import main


@pytest.fixture
def write_scene(write_raster: Any) -> Callable[..., str]:
    """write_scene(path) -> the path of random pixels whose left quarter is zero."""

    def write(path: Path, height: int = 100, width: int = 140, **options: Any) -> str:
        pixels = np.random.default_rng(0).integers(1, 255, (3, height, width)).astype(np.uint8)
        pixels[:, :, : width // 4] = 0
        return str(write_raster(path, pixels, **options))

    return write


def test_pictures_of_a_scene(
    best: Path, tmp_path: Path, capsys: pytest.CaptureFixture, write_scene: Any
) -> None:
    scene = write_scene(tmp_path / "scene.tif", nodata=0)
    words = ["features", scene, "--model", str(best), "--layers", "1,3", "--output", str(tmp_path / "out")]
    assert main([*words, "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    names = [
        f"scene{part}.png" for part in ("", *(f"-layer-{i}-{k}" for i in (1, 3) for k in ("pca", "mean")))
    ]
    assert [Path(line).name for line in out.splitlines()] == names and err == ""
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(names)
    with Pillow.open(tmp_path / "out" / "scene-layer-3-pca.png") as picture:
        assert picture.size == (140, 100) and picture.mode == "RGBA"
        alpha = np.asarray(picture)[..., 3]
        assert (alpha[:, :16] == 0).all() and (alpha[:, 60:] == 255).all()
    before = (tmp_path / "out" / "scene-layer-3-pca.png").read_bytes()
    assert main([*words, "--device", "cpu"]) == 0
    assert (tmp_path / "out" / "scene-layer-3-pca.png").read_bytes() == before


def test_pictures_of_folders_and_of_an_ordinary_image(best: Path, tmp_path: Path, write_scene: Any) -> None:
    for name in ("a/1.png", "a/2.png", "b/1.png"):
        write_scene(tmp_path / name, 64, 64, driver="PNG")
    words = ["features", str(tmp_path / "a"), str(tmp_path / "b"), "--model", str(best), "--most", "1"]
    assert main([*words, "--output", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert len(list((tmp_path / "out" / "a").iterdir())) == len(list((tmp_path / "out" / "b").iterdir())) == 3


def test_pictures_of_a_data_sets_domain(best: Path, tmp_path: Path) -> None:
    words = ["features", "region=coast", "--data", "synthetic", "--data-args.size", "64", "--most", "1"]
    assert (
        main([*words, "--model", str(best), "--output", str(tmp_path), "--layers", "2", "--device", "cpu"])
        == 0
    )
    (folder,) = tmp_path.iterdir()
    assert folder.name == "region=coast" and len(list(folder.iterdir())) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("nowhere.tif", "nowhere.tif: no such file"),
        ("SCENE --model nothing", "--model nothing: neither a folder"),
        ("SCENE --layers 9", "--layers 9: rs_sam_tiny has the layers 0 to 3"),
        ("SCENE --root x", "--root belongs to a data set"),
        ("SCENE SCENE", "one of them is named twice"),
        ("SCENE OTHER", "two of the images would be drawn there"),
        ("EMPTY", "this folder holds no images"),
        ("SCENE --most 0", "--most must be at least 1"),
        ("SCENE --output SCENE", "is a file; give a folder"),
        ("nowhere --data synthetic", "is not understood"),
        ("SCENE --compare", "--compare takes two or more"),
        ("SCENE --overlap 1", "overlap 1.0 is not in [0, 1)"),
    ],
)
def test_what_is_wrong_is_one_line_and_2(
    words: str,
    message: str,
    best: Path,
    tmp_path: Path,
    fake_umap: list[Any],
    write_scene: Any,
    error_line: Any,
) -> None:
    (tmp_path / "empty").mkdir()
    places = {
        "SCENE": write_scene(tmp_path / "scene.tif", 64, 64),
        "OTHER": write_scene(tmp_path / "other" / "scene.tif", 64, 64),
        "EMPTY": str(tmp_path / "empty"),
    }
    chosen = [places.get(word, word) for word in words.split()]
    for option, value in (("--model", str(best)), ("--output", str(tmp_path / "out"))):
        if option not in chosen:
            chosen += [option, value]
    assert main(["features", *chosen, "--device", "cpu"]) == 2
    assert message in error_line()
    assert not (tmp_path / "out").exists()


def test_a_scene_without_a_pixel_is_said(
    best: Path, tmp_path: Path, write_raster: Any, error_line: Any
) -> None:
    path = write_raster(tmp_path / "empty.tif", np.zeros((3, 64, 64), np.uint8), nodata=0)
    assert main(["features", str(path), "--model", str(best), "--output", str(tmp_path / "out")]) == 2
    assert "every pixel of the images is nodata" in error_line()


# ---------------------------------------------------------------------------------------- several domains


@pytest.fixture
def fake_umap(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A module in place of umap-learn, which keeps what it is given and puts features on their first two."""
    seen: list[Any] = []

    class UMAP:
        def __init__(self, **options: Any) -> None:
            seen.append(options)

        def fit_transform(self, features: np.ndarray) -> np.ndarray:
            seen.append(features)
            return features[:, :2]

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=UMAP))
    return seen


def test_two_domains_in_one_plane(
    best: Path, tmp_path: Path, fake_umap: list[Any], capsys: pytest.CaptureFixture
) -> None:
    words = (
        "features bands=rgb bands=irrg --data synthetic --data-args.size 64 --data-args.length 3 --compare"
    )
    options = [
        "--model",
        str(best),
        "--output",
        str(tmp_path),
        "--points",
        "20",
        "--layers",
        "0,3",
        "--device",
        "cpu",
    ]
    assert main([*words.split(), *options]) == 0
    written = [tmp_path / f"umap-layer-{index}.png" for index in (0, 3)]
    assert capsys.readouterr().out.split() == [str(path) for path in written]
    assert sorted(tmp_path.iterdir()) == written
    asked = [options for options in fake_umap if isinstance(options, dict)]
    features = [array for array in fake_umap if not isinstance(array, dict)]
    assert asked == [{"n_neighbors": 15, "random_state": 0}] * 2
    assert all(array.shape[1] == 128 and 36 <= len(array) <= 42 for array in features)


def test_two_scenes_in_one_plane(best: Path, tmp_path: Path, fake_umap: list[Any], write_scene: Any) -> None:
    scenes = [write_scene(tmp_path / name / "scene.tif", 64, 64) for name in ("a", "b")]
    words = ["features", *scenes, "--compare", "--model", str(best), "--output", str(tmp_path / "out")]
    assert main([*words, "--points", "5", "--device", "cpu"]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["umap-layer-3.png"]
    assert fake_umap[0]["n_neighbors"] == 9 and len(fake_umap[1]) == 10


def test_without_umap_the_way_out_is_said(
    best: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_line: Any
) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    assert (
        main(["features", "a.tif", "b.tif", "--compare", "--model", str(best), "--output", str(tmp_path)])
        == 2
    )
    line = error_line()
    assert line.startswith("--compare needs umap-learn") and line.endswith('pip install "rsmodels[viz]"')
