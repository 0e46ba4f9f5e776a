"""check_dataset finds every problem of a folder in one pass."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rsmodels.data import check_dataset

CLASSES = """
encoding: values
classes:
  - {name: land, color: "8429f6"}
  - {name: water, color: "0000ff"}
"""


@pytest.fixture
def root(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 2), ("test", 2)):
        for name in ("images", "masks"):
            (tmp_path / split / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(
                tmp_path / f"{split}/images/{index}.png"
            )
            Image.fromarray(np.eye(8, dtype=np.uint8)).save(tmp_path / f"{split}/masks/{index}.png")
    (tmp_path / "classes.yaml").write_text(CLASSES)
    return tmp_path


def save(path: Path, array: np.ndarray) -> None:
    Image.fromarray(array).save(path)


def test_a_sound_folder(root, capfd):
    report = check_dataset("folder", root)
    assert report.ok
    assert (report.errors, report.warnings) == ([], [])
    assert report.tiles == {"train": 5, "val": 2, "test": 2}
    assert report.histogram["train"] == {"land": 5 * 56, "water": 5 * 8}
    assert report.ignored == {"train": 0, "val": 0, "test": 0}
    assert (report.bands, report.dtypes, report.sizes) == ({3: 9}, {"uint8": 9}, {(8, 8): 9})
    text = report.format()
    assert "train 5, val 2, test 2" in text
    assert "12.50%" in text
    assert text.endswith("0 errors, 0 warnings")
    assert capfd.readouterr() == ("", "")  # no progress bar where nobody watches


def test_all_that_is_wrong_is_found_at_once(root):
    (root / "train/masks/0.png").unlink()
    (root / "val/images/1.png").unlink()
    save(root / "train/masks/1.png", np.full((8, 8), 7, np.uint8))
    save(root / "train/masks/2.png", np.zeros((8, 9), np.uint8))
    (root / "train/images/3.png").write_bytes((root / "train/images/3.png").read_bytes()[:60])
    shutil.copy(root / "train/images/4.png", root / "test/images/0.png")
    save(root / "test/images/1.png", np.zeros((8, 8), np.uint8))
    report = check_dataset("folder", root)
    assert not report.ok
    expected = [
        "train/images/0.png: the image has no mask",
        "train/masks/1.png: unknown label 7",
        "train/images/2.png: the image is 8x8 pixels, its mask is 8x9",
        "train/images/3.png: cannot be read",
        "val/masks/1.png: the mask has no image",
        "test/images/0.png (test): the same pixels as",
        "differ in their number of bands: 3 (5), 1 (1)",
    ]
    found = "\n".join(report.errors)
    assert [part for part in expected if part not in found] == []
    assert len(report.errors) == len(expected)
    assert all("\n" not in error for error in report.errors)
    assert f"{len(expected)} errors" in report.format()


def test_duplicates_outside_of_train_are_a_warning(root):
    shutil.copy(root / "val/images/0.png", root / "test/images/0.png")
    shutil.copy(root / "train/images/0.png", root / "train/images/1.png")
    report = check_dataset("folder", root)
    assert report.ok
    assert len(report.warnings) == 2


def test_labels_that_nobody_would_learn_from(root):
    for path in root.glob("*/masks/*.png"):
        save(path, np.full((8, 8), 9, np.uint8))
    (root / "classes.yaml").write_text(CLASSES + "ignore: {values: [9]}\n")
    report = check_dataset("folder", root)
    assert report.warnings == ["100 % of the pixels are ignored"]
    for path in root.glob("*/masks/*.png"):
        save(path, np.zeros((8, 8), np.uint8))
    assert check_dataset("folder", root).warnings == ["class 'water' never occurs"]


def test_foreground_that_counts_as_ignored(root):
    for path in root.glob("*/masks/*.png"):
        save(path, np.eye(8, dtype=np.uint8) * 255)
    (root / "classes.yaml").write_text(CLASSES + "ignore: {values: [255]}\n")
    errors = check_dataset("folder", root).errors
    assert len(errors) == 1
    assert "values: [255]" in errors[0]


def test_missing_splits(root):
    shutil.rmtree(root / "val")
    for path in root.glob("test/*/*.png"):
        path.unlink()
    report = check_dataset("folder", root)
    assert report.ok
    assert any("no such split" in warning for warning in report.warnings)
    assert "split 'test' is empty" in report.warnings
    shutil.rmtree(root / "train")
    assert not check_dataset("folder", root).ok


def test_a_root_that_does_not_exist_is_said_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        check_dataset("whdld", tmp_path / "nowhere")


def test_many_errors_are_counted_and_not_all_printed(root):
    for index in range(30):
        save(root / f"train/masks/x{index}.png", np.zeros((8, 8), np.uint8))
    report = check_dataset("folder", root)
    assert len(report.errors) == 30
    assert "and 10 more" in report.format()


def test_a_data_set_or_option_that_does_not_exist_is_the_callers_mistake(root):
    with pytest.raises(ValueError, match="unknown"):
        check_dataset("nothing", root)
    with pytest.raises(ValueError, match="no option 'colour'"):
        check_dataset("folder", root, colour=3)


def test_synthetic_scenes_pass():
    report = check_dataset("synthetic", size=32, length=4)
    assert report.errors == []
    assert report.tiles == {"train": 4, "val": 4, "test": 4}
