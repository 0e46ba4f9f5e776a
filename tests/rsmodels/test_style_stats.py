"""`rsmodels style-stats`: which images it takes, what it makes of them, and what it says of the others."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rsmodels import style_stats
from rsmodels.cli import main
from rsmodels.data.synthetic.gaps import TARGETS, left_out
from rsmodels.data.synthetic.scene import render_scene
from rsmodels.pretraining.scenes import SPLIT, SceneStream, places
from rsmodels.style import ColorStyle, StyleStatistics
from rsmodels.style.statistics import SYNTHETIC_FIELD
from rsmodels.style_stats import StyleStatsConfig, find_images, measure_styles, read_windows, spread_windows

# Three images do for most tests, and for no covariance.
pytestmark = pytest.mark.filterwarnings("ignore:.*do not fill their covariance")


def pixels(seed: int, size: tuple[int, int] = (40, 48), bands: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 60 + 20 * seed, (bands, *size)).astype(np.uint8)


def embed(*images: np.ndarray) -> torch.Tensor:
    return torch.cat([ColorStyle().embed(torch.from_numpy(image)[None] / 255) for image in images]).double()


def config(folder: Path | None, output: Path, **options: Any) -> StyleStatsConfig:
    return StyleStatsConfig(str(output), None if folder is None else str(folder), device="cpu", **options)


def fail(error: Exception) -> None:
    raise error


def words(folder: Path | str, output: Path, *more: str) -> list[str]:
    return ["style-stats", str(folder), "--output", str(output), "--device", "cpu", *more]


@pytest.fixture
def archive(tmp_path: Path, write_raster: Any) -> Path:
    """Three images in subfolders, of two formats, and what lies about in real folders."""
    root = tmp_path / "archive"
    write_raster(root / "b" / "two.tif", pixels(2))
    write_raster(root / "a" / "deeper" / "one.tif", pixels(1))
    (root / "c").mkdir()
    Image.fromarray(pixels(3).transpose(1, 2, 0)).save(root / "c" / "three.png")
    (root / "README.txt").write_text("about these images")
    (root / "index.json").write_text("{}")
    (root / ".cache").mkdir()
    write_raster(root / ".cache" / "hidden.tif", pixels(9))
    return root


# ------------------------------------------------------------------------------------------------ measuring


def test_the_statistics_are_those_of_the_images(archive: Path, tmp_path: Path) -> None:
    measured = measure_styles(config(archive, tmp_path / "s.json"), fail)
    embeddings = embed(pixels(1), pixels(2), pixels(3))
    loaded = StyleStatistics.load(tmp_path / "s.json")
    assert (measured.images, measured.failed, loaded.count) == (3, 0, 3)
    torch.testing.assert_close(loaded.mean, embeddings.mean(0), atol=1e-7, rtol=0)
    torch.testing.assert_close(loaded.covariance, torch.cov(embeddings.T), atol=1e-8, rtol=0)
    loaded.check(ColorStyle())
    assert "3 images" in loaded.source and str(archive) in loaded.source
    assert [path.name for path in find_images(archive)] == ["one.tif", "two.tif", "three.png"]


def test_linked_folders_are_searched_once(archive: Path, tmp_path: Path, write_raster: Any) -> None:
    write_raster(tmp_path / "elsewhere" / "four.tif", pixels(4))
    (archive / "d").symlink_to(tmp_path / "elsewhere")
    (archive / "e").symlink_to(tmp_path / "elsewhere")
    (archive / "c" / "round").symlink_to(archive)
    found = [path.relative_to(archive).as_posix() for path in find_images(archive)]
    assert found == ["a/deeper/one.tif", "b/two.tif", "c/three.png", "d/four.tif"]


def test_bands_limit_and_value_range(archive: Path, tmp_path: Path, write_raster: Any) -> None:
    measure_styles(config(archive, tmp_path / "s.json", bands=(3, 2, 1), limit=2), fail)
    expected = embed(pixels(1)[::-1].copy(), pixels(2)[::-1].copy()).mean(0)
    torch.testing.assert_close(StyleStatistics.load(tmp_path / "s.json").mean, expected, atol=1e-7, rtol=0)

    deep = tmp_path / "deep"
    for seed in (1, 2):
        write_raster(deep / f"{seed}.tif", pixels(seed).astype(np.uint16) * 40)
    measure_styles(config(deep, tmp_path / "d.json", value_range=255 * 40.0), fail)
    expected = embed(pixels(1), pixels(2)).mean(0)
    torch.testing.assert_close(StyleStatistics.load(tmp_path / "d.json").mean, expected, atol=1e-6, rtol=0)


def test_the_same_archive_gives_the_same_bytes(archive: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        measure_styles(config(archive, tmp_path / f"{name}.json"), fail)
    assert (tmp_path / "first.json").read_bytes() == (tmp_path / "second.json").read_bytes()


@pytest.mark.parametrize("whole", [2**24, 0])
def test_large_images_are_cut_and_holes_left_out(
    whole: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_raster: Any
) -> None:
    monkeypatch.setattr(style_stats, "WHOLE", whole)
    image = np.maximum(pixels(5, (70, 100)), 1)
    image[:, 50, 20] = 0  # in one window of six
    write_raster(tmp_path / "scene.tif", image, nodata=0)
    views = read_windows(tmp_path / "scene.tif", config(tmp_path, tmp_path / "s.json", image_size=32))
    places_of = spread_windows(70, 100, 32)
    assert len(places_of) == 6 and views.shape == (5, 3, 32, 32)
    kept = [
        w for w in places_of if not (w.row_off <= 50 < w.row_off + 32 and w.col_off <= 20 < w.col_off + 32)
    ]
    for view, window in zip(views, kept, strict=True):
        rows, columns = window.toslices()
        np.testing.assert_array_equal(view.numpy() * 255, image[:, rows, columns])


@pytest.mark.parametrize(
    ("size", "count"),
    [((31, 20), 1), ((32, 32), 1), ((63, 500), 15), ((64, 500), 16), ((5000, 40), 16), ((3000, 4000), 16)],
)
def test_windows_lie_evenly_and_apart(size: tuple[int, int], count: int) -> None:
    windows = spread_windows(*size, 32)
    assert len(windows) == count
    covered = np.zeros(size, int)
    for window in windows:
        rows, columns = window.toslices()
        covered[rows, columns] += 1
    assert covered.max() == 1 and covered.sum() == count * min(32, size[0]) * min(32, size[1])
    middle = np.argwhere(covered).mean(0)
    np.testing.assert_allclose(middle, (np.array(size) - 1) / 2, atol=1)


# ------------------------------------------------------------------------------------------ generated scenes


def test_generated_scenes_leave_the_targets_out(tmp_path: Path) -> None:
    options = {"data": "synthetic", "image_size": 32, "limit": 12, "seed": 3, "num_workers": 0}
    measured = measure_styles(config(None, tmp_path / "s.json", **options), fail)
    choice = places(left_out())
    stream, embeddings = SceneStream(3, 32, choice, looks=1), []
    for index in range(12):
        (place,), (scene,) = stream[index]
        domain, bands = choice[place]
        image = render_scene((3, SPLIT, index), 32, domain).image
        assert np.array_equal(image, scene.numpy())
        for name in bands:
            seen = type(domain)(domain.region, name, domain.platform, domain.climate)
            assert seen not in TARGETS.values()
            embeddings.append(embed(image[:3] if name == "rgb" else image[[3, 0, 1]]))
    expected = torch.cat(embeddings)
    assert measured.statistics.count == len(expected) > 12
    torch.testing.assert_close(measured.statistics.mean, expected.mean(0), atol=1e-7, rtol=0)


def test_the_shipped_file_is_what_the_command_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not measured again in full: its words are, and its figures are close to those of a few scenes."""
    shipped = StyleStatistics.load(SYNTHETIC_FIELD)
    options = {"data": "synthetic", "limit": 30, "num_workers": 0}
    few = measure_styles(config(None, tmp_path / "s.json", **options), fail).statistics
    assert shipped.source == few.source.replace("30 generated", f"{style_stats.SYNTHETIC_SCENES} generated")
    assert (few.mean - shipped.mean).abs().max() < 0.05


# ------------------------------------------------------------------------------------------- what is wrong


def test_images_that_cannot_be_used_are_named_and_left_out(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture, write_raster: Any
) -> None:
    (archive / "b" / "broken.tif").write_bytes((archive / "b" / "two.tif").read_bytes()[:200])
    write_raster(archive / "b" / "grey.tif", pixels(1, bands=1))
    write_raster(archive / "b" / "deep.tif", pixels(1).astype(np.uint16) * 9)
    write_raster(archive / "b" / "empty.tif", np.zeros((3, 20, 20), np.uint8), nodata=0)
    assert main(words(archive, tmp_path / "s.json")) == 3
    out, err = capsys.readouterr()
    assert out.startswith(f"{tmp_path / 's.json'}: 3 styles of 3 images; 4 could not be used")
    lines = [line for line in err.splitlines() if line.startswith("rsmodels: error: ")]
    assert [line.split(": ")[2].rsplit("/")[-1] for line in lines] == [
        "broken.tif",
        "deep.tif",
        "empty.tif",
        "grey.tif",
    ]
    for line, reason in zip(
        lines, ("cannot be read", "--value-range", "without data", "--bands"), strict=True
    ):
        assert reason in line
    assert StyleStatistics.load(tmp_path / "s.json").count == 3


def test_few_images_are_said_to_be_few(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(words(archive, tmp_path / "s.json")) == 0
    err = capsys.readouterr().err
    assert "rsmodels: warning: " in err and "3 styles of 9 numbers" in err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--style ghiasi", "--style ghiasi needs --style-weights"),
        ("--style ghiasi --style-weights nowhere", "nowhere: no such folder"),
        ("--style-weights x", "the style 'color' has none"),
        ("--bands 1,2", "--bands 1,2: a style is of three bands"),
        ("--bands 1,2,4", "ALL"),
        ("--limit 1", "--limit 1: expected 2 or more"),
        ("--image-size 0", "--image-size 0: expected 2 or more"),
        ("--value-range 0", "--value-range 0: expected the raw value"),
        ("--data synthetic", "give a folder of images, or --data synthetic"),
        ("--leave-out region=coast", "--leave-out: has no meaning for a folder"),
        ("--output s.txt", "--output s.txt: expected a file name that ends in .json"),
        ("--device cuda:77", "cuda:77"),
    ],
)
def test_bad_requests_are_one_line_and_2(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture, more: str, message: str
) -> None:
    assert main([*words(archive, tmp_path / "s.json"), *more.split()]) == 2
    err = capsys.readouterr().err
    last = err.splitlines()[-1]
    if message == "ALL":
        assert "bands [1, 2, 4] were asked for" in err
        message = "0 of its 3 images could be used"
    assert last.startswith("rsmodels: error: ") and message in last
    assert not (tmp_path / "s.json").exists()


def test_folders_and_outputs_that_do_not_serve(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "s.json"
    assert main(words(tmp_path / "nowhere", output)) == 2
    assert "nowhere: no such folder; give one that holds images" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(words(tmp_path / "empty", output)) == 2
    assert "empty: holds no images" in capsys.readouterr().err
    assert main(["style-stats", "--output", str(output)]) == 2
    assert "give a folder of images, or --data synthetic" in capsys.readouterr().err
    assert main(["style-stats", "--data", "synthetic", "--bands", "1,2,3", "--output", str(output)]) == 2
    assert "--bands: has no meaning for generated scenes" in capsys.readouterr().err
    (tmp_path / "folder.json").mkdir()
    assert main(words(tmp_path / "empty", tmp_path / "folder.json")) == 2
    assert "folder.json: is a folder; give a file name" in capsys.readouterr().err
    output.write_text("{}")
    assert main(words(tmp_path / "empty", output)) == 2
    assert "already exists" in capsys.readouterr().err and output.read_text() == "{}"
