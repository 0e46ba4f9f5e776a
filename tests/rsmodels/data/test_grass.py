"""The grass set of KTDA, on a miniature of its layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import rsmodels
from rsmodels.cli import main
from rsmodels.data import check_dataset, create_dataset, dataset_options

SIDE = 20
COUNTS = {"train": 6, "val": 3}


def write_mask(path: Path, ids: np.ndarray, *, palette: bool = False) -> None:
    mask = Image.fromarray(ids.astype(np.uint8))
    if palette:  # colours that mean nothing to the reader
        mask.putpalette([channel for index in range(256) for channel in (index, 255 - index, 7)])
    mask.save(path)


@pytest.fixture
def root(tmp_path: Path, write_raster: Any) -> Path:
    """Tile N; four rows of each level, from low to high."""
    number = 0
    for split, count in COUNTS.items():
        for kind in ("img_dir", "ann_dir"):
            (tmp_path / kind / split).mkdir(parents=True)
        for _ in range(count):
            levels = np.repeat(np.arange(5), SIDE // 5)[:, None].repeat(SIDE, 1)
            pixels = np.random.default_rng(number).integers(0, 256, (3, SIDE, SIDE), np.uint8)
            write_raster(tmp_path / f"img_dir/{split}/{number}.tif", pixels)
            write_mask(tmp_path / f"ann_dir/{split}/{number}.png", levels, palette=number % 2 == 1)
            number += 1
    return tmp_path


def test_splits_bands_and_levels(root: Path) -> None:
    train, val = create_dataset("grass", root=root), create_dataset("grass", root=root, split="val")
    assert (train.names, val.names) == (["0", "1", "2", "3", "4", "5"], ["6", "7", "8"])
    for sample in (train[0], train[1]):  # grey values, and palette indices
        assert sample["image"].shape == (3, SIDE, SIDE) and sample["image"].dtype == torch.float32
        assert sample["mask"][:: SIDE // 5, 0].tolist() == [0, 1, 2, 3, 4]
        assert sample["domain"] == "grass"
    assert (train.schema.classes[0], train.schema.palette[0]) == ("low", (185, 101, 71))
    assert (train.schema.classes[-1], train.schema.palette[-1]) == ("high", (92, 144, 77))
    assert dataset_options("grass") == ["bands"]
    swapped = create_dataset("grass", root=root, bands=[3, 2])
    assert torch.equal(swapped[0]["image"], train[0]["image"][[2, 1]])


def test_test_is_val_and_says_so(root: Path) -> None:
    test = create_dataset("grass", root=root, split="test")
    assert test.names == create_dataset("grass", root=root, split="val").names
    assert len(test.notes) == 1 and "without a test split" in test.notes[0]
    assert [create_dataset("grass", root=root, split=split).notes for split in COUNTS] == [(), ()]


def test_a_sound_copy_passes_with_one_warning(root: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["check-data", "grass", "--root", str(root)]) == 0
    out = capsys.readouterr().out
    assert "train 6, val 3, test 3" in out
    assert out.rstrip().endswith("0 errors, 1 warnings") and "warning: grass was published without" in out


def test_all_that_is_wrong_is_found_once(root: Path, capsys: pytest.CaptureFixture) -> None:
    (root / "ann_dir/train/0.png").unlink()
    (root / "img_dir/val/6.tif").unlink()
    write_mask(root / "ann_dir/train/1.png", np.full((SIDE, SIDE), 5))
    write_mask(root / "ann_dir/train/2.png", np.zeros((SIDE, SIDE - 1)))
    damaged = root / "img_dir/val/7.tif"
    damaged.write_bytes(damaged.read_bytes()[:-200])
    expected = [
        "img_dir/train/0.tif: the image has no mask",
        "ann_dir/val/6.png: the mask has no image",
        "ann_dir/train/1.png: unknown label 5 (400 pixels); allowed: 0 low, 1 middle-low, 2 middle",
        "img_dir/train/2.tif: the image is 20x20 pixels, its mask is 20x19",
        "img_dir/val/7.tif: cannot be read",
    ]
    errors = check_dataset("grass", root).errors
    assert len(errors) == len(expected)
    assert [part for part in expected if not any(part in error for error in errors)] == []
    assert main(["check-data", "grass", "--root", str(root)]) == 1
    assert "5 errors" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.eye(SIDE) * 255, r"6\.png: the mask holds 0/255, a two-class mask"),
        (np.eye(SIDE) * 9, r"6\.png: unknown label 9 \(20 pixels\); allowed: 0 low"),
        (np.eye(SIDE)[..., None] * (92, 144, 77), r"6\.png: the mask holds colours"),
    ],
)
def test_masks_of_another_coding_are_refused(root: Path, mask: np.ndarray, message: str) -> None:
    """Read as ids, 255 would be the ignored id, and a colour nothing at all."""
    write_mask(root / "ann_dir/val/6.png", mask)
    with pytest.raises(ValueError, match=message):
        create_dataset("grass", root=root, split="val")[0]


def test_missing_folders_and_halves(root: Path, tmp_path: Path) -> None:
    (root / "ann_dir/train/3.png").unlink()
    with pytest.raises(ValueError, match=r"3\.tif: the image has no mask"):
        create_dataset("grass", root=root)
    with pytest.raises(FileNotFoundError, match="'grass' expects img_dir/train under its root"):
        create_dataset("grass", root=tmp_path / "img_dir")


def test_a_report_on_test_says_that_it_is_val(root: Path, tmp_path: Path) -> None:
    schema = create_dataset("grass", root=root).schema.to_dict()
    model = rsmodels.create_model("rs_sam_tiny", num_classes=5, image_size=32)
    rsmodels.save_model(model, tmp_path / "run/best", {key: schema[key] for key in ("classes", "palette")})
    words = f"evaluate --model {tmp_path / 'run/best'} --data grass --root {root} --device cpu --tiles 1"
    assert main(words.split()) == 0
    report = tmp_path / "run/report"
    assert json.loads((report / "metrics.json").read_text())["pixels"] == COUNTS["val"] * SIDE * SIDE
    assert "grass was published without a test split" in (report / "index.html").read_text()
