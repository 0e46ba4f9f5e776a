"""The folder data set: layouts, classes.yaml, and real imagery where it is at hand."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rsmodels.data import create_dataset
from rsmodels.data.folder import read_classes
from rsmodels.data.schema import IGNORE
from rsmodels.data.transforms import collate, random_crop

SHARED = Path(__file__).parents[4] / "shared" / "data"
needs_real = pytest.mark.skipif(not (SHARED / "dubai").is_dir(), reason=f"no real imagery at {SHARED}")

VALUES = """
encoding: values
classes:
  - {name: land, color: "8429f6"}
  - {name: water, color: [0, 0, 255], values: [1, 5]}
ignore:
  values: [9]
"""
DUBAI = """
encoding: colors
classes:
  - {name: building, color: "3c1098"}
  - {name: land, color: "8429f6"}
  - {name: road, color: "6ec1e4"}
  - {name: vegetation, color: "fedd3a"}
  - {name: water, color: "e2a929"}
ignore:
  colors: ["9b9b9b", "000000"]
"""
BUILDINGS = """
encoding: values
binary: true
classes:
  - {name: background, color: "282828"}
  - {name: building, color: "ffffff"}
"""


def write_group(folder: Path, count: int = 3, mask: np.ndarray | None = None, suffix: str = "") -> Path:
    rng = np.random.default_rng(len(str(folder)))
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for index in range(count):
        Image.fromarray(rng.integers(0, 256, (8, 8 + index, 3), np.uint8)).save(
            folder / f"images/{index}.jpg"
        )
        ids = np.zeros((8, 8 + index), np.uint8) if mask is None else mask[:, : 8 + index]
        Image.fromarray(ids).save(folder / f"masks/{index}{suffix}.png")
    return folder


def write_classes(folder: Path, text: str = VALUES) -> Path:
    (folder / "classes.yaml").write_text(text)
    return folder / "classes.yaml"


def names(root: Path, split: str, **options) -> list[str]:
    return list(create_dataset("folder", root=root, split=split, **options).names)


def test_a_flat_folder_is_split_by_seed(tmp_path):
    write_group(tmp_path, 20)
    write_classes(tmp_path)
    parts = [names(tmp_path, split) for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [14, 3, 3]
    assert len(set().union(*parts)) == 20
    assert [len(names(tmp_path, s, ratios=[0.5, 0.25, 0.25])) for s in ("train", "val", "test")] == [10, 5, 5]
    assert names(tmp_path, "train", seed=1) != parts[0]


def test_folders_named_as_splits_are_the_splits(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        write_group(tmp_path / split, count)
    write_classes(tmp_path)
    assert (len(names(tmp_path, "train")), len(names(tmp_path, "val"))) == (3, 2)
    with pytest.raises(FileNotFoundError, match="test: no such split; the folder has train, val"):
        names(tmp_path, "test")


def test_groups_go_to_the_splits_by_name(tmp_path):
    for group in "abc":
        write_group(tmp_path / group, 10)
    write_classes(tmp_path)
    options = {"train": "a, b", "test": ["c"]}
    train, val, test = (names(tmp_path, split, **options) for split in ("train", "val", "test"))
    assert test == [f"c/{index}" for index in range(10)]
    assert (len(train), len(val)) == (17, 3)  # without `val`, a seeded share of the train groups
    assert not set(train) & set(val)
    assert names(tmp_path, "val", **options, val_fraction=0.5) != val
    options["val"] = "b"
    with pytest.raises(ValueError, match="'b' is in train and in val"):
        names(tmp_path, "train", **options)
    options["train"] = "a"
    assert names(tmp_path, "val", **options) == [f"b/{index}" for index in range(10)]
    assert create_dataset("folder", root=tmp_path, split="test", **options)[0]["domain"] == "c"


def test_groups_may_be_named_by_numbers(tmp_path):
    for group in ("2017", "2018"):
        write_group(tmp_path / group, 2)
    write_classes(tmp_path)
    assert names(tmp_path, "test", train=2017, test=[2018]) == ["2018/0", "2018/1"]


def test_groups_without_a_choice_are_listed(tmp_path):
    write_group(tmp_path / "tile1")
    write_group(tmp_path / "tile2")
    write_classes(tmp_path)
    with pytest.raises(ValueError, match="groups tile1, tile2; say which"):
        names(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match="tile7"):
        names(tmp_path, "train", train="tile7")


def test_a_folder_of_nothing(tmp_path):
    write_classes(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither images/ and masks/"):
        names(tmp_path, "train")


def test_values_ignored_values_and_images_of_their_own_size(tmp_path):
    mask = np.tile(np.array([0, 1, 5, 9, 0, 0, 0, 0, 0, 0], np.uint8), (8, 1))
    write_group(tmp_path / "train", 3, mask)
    dataset = create_dataset("folder", root=tmp_path, classes=write_classes(tmp_path))
    assert [tuple(dataset[index]["mask"].shape) for index in range(3)] == [(8, 8), (8, 9), (8, 10)]
    assert dataset[0]["mask"][0].tolist() == [0, 1, 1, IGNORE, 0, 0, 0, 0]
    batch = random_crop(collate([dataset[index] for index in range(3)]), 9, torch.Generator().manual_seed(0))
    assert batch["image"].shape == (3, 3, 9, 9)


def test_mask_names_may_carry_a_suffix(tmp_path):
    write_group(tmp_path / "train", 2, suffix="_lab")
    write_classes(tmp_path, VALUES + "mask_suffix: _lab\n")
    assert names(tmp_path, "train") == ["0", "1"]
    write_classes(tmp_path)
    with pytest.raises(ValueError, match=r"0\.jpg: the image has no mask \(and 3 more\)"):
        names(tmp_path, "train")


def test_two_images_of_one_name_are_ambiguous(tmp_path):
    write_group(tmp_path / "train", 1)
    write_classes(tmp_path)
    shutil.copy(tmp_path / "train/images/0.jpg", tmp_path / "train/images/0.png")
    with pytest.raises(ValueError, match=r"0\.png: 0\.jpg has the same name"):
        names(tmp_path, "train")


def test_foreground_that_is_declared_as_ignored_is_found_out(tmp_path):
    mask = np.zeros((8, 10), np.uint8)
    mask[:3] = 255
    write_group(tmp_path / "train", 3, mask)
    write_classes(tmp_path, BUILDINGS + "ignore: {values: [255]}\n")
    with pytest.raises(ValueError, match=r"hold no 'building', only 0 and 255.*values: \[255\]"):
        create_dataset("folder", root=tmp_path)
    mask[5:] = 1  # foreground beside ignored pixels is an ordinary mask
    Image.fromarray(mask).save(tmp_path / "train/masks/2.png")
    assert len(create_dataset("folder", root=tmp_path)) == 3
    write_classes(tmp_path, BUILDINGS)
    with pytest.raises(ValueError, match=r"0\.png: the mask holds 0/255"):
        create_dataset("folder", root=tmp_path)[0]
    write_classes(tmp_path, BUILDINGS + "threshold: 1\n")
    assert create_dataset("folder", root=tmp_path)[0]["mask"].sum() == 24


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "not the keys"),
        ("classes: [", "not readable as YAML"),
        ("encoding: values\nclasses: []", "`classes` is not a list"),
        ("classes: [{name: a, color: '000000'}]", "`encoding` is None"),
        ("encoding: values\nclasses: [{name: a}]", "needs a name and a color"),
        ("encoding: values\nclasses: [{name: a, color: 000000}]", "in quotes"),
        ("encoding: values\nclasses: [{name: a, color: '000000', value: 3}]", "key 'value' is unknown"),
        ("encoding: values\nclasses: [{name: a, color: '000000', values: [x]}]", "not whole numbers"),
        ("encoding: values\nclass: 3\nclasses: [{name: a, color: '000000'}]", "key 'class' is unknown"),
        (VALUES.replace("[9]", "[5]"), "label 5 of 'ignore' is taken by 'water'"),
        (DUBAI.replace("3c1098", "8429f6"), "taken by 'building'"),
        (VALUES + "ignored: []", "key 'ignored' is unknown"),
        (VALUES.replace("land", "water"), "used twice"),
        (VALUES + "threshold: 3", "binary"),
    ],
)
def test_mistakes_in_a_classes_file_are_named(tmp_path, text, message):
    path = write_classes(tmp_path, text)
    with pytest.raises(ValueError, match=message) as error:
        read_classes(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_no_classes_file(tmp_path):
    write_group(tmp_path / "train", 1)
    with pytest.raises(FileNotFoundError, match=r"classes\.yaml: no classes file"):
        create_dataset("folder", root=tmp_path)


def test_palette_masks_are_read_by_colour_where_the_classes_say_colours(tmp_path):
    write_group(tmp_path / "train", 1)
    mask = Image.fromarray(np.array([[0, 1, 2] + [0] * 5] * 8, np.uint8))
    mask.putpalette([0x3C, 0x10, 0x98, 0x84, 0x29, 0xF6, 0x9B, 0x9B, 0x9B])
    mask.save(tmp_path / "train/masks/0.png")
    write_classes(tmp_path, DUBAI)
    assert create_dataset("folder", root=tmp_path)[0]["mask"][0, :4].tolist() == [0, 1, IGNORE, 0]


@needs_real
def test_dubai_by_tile(tmp_path):
    options = {"classes": write_classes(tmp_path, DUBAI), "train": "tile1,tile2,tile3", "test": "tile6"}
    train, val, test = (
        create_dataset("folder", root=SHARED / "dubai", split=split, **options)
        for split in ("train", "val", "test")
    )
    assert (len(train), len(val), len(test)) == (23, 4, 9)
    # Tile 2 has palette masks, the others colours; tile 6 has 000000 pixels.
    for dataset, group in ((train, "tile2/"), (train, "tile3/"), (test, "tile6/")):
        index = next(i for i, name in enumerate(dataset.names) if name.startswith(group))
        sample = dataset[index]
        assert sample["image"].shape[1:] == sample["mask"].shape
        assert set(sample["mask"].unique().tolist()) <= {0, 1, 2, 3, 4, IGNORE}
        assert ((sample["mask"] != IGNORE).sum() / sample["mask"].numel()) > 0.8
        assert sample["domain"] == group[:-1]


@needs_real
def test_drone_tiles_with_jpeg_and_rgba_inside_png(tmp_path):
    options = {"classes": write_classes(tmp_path, BUILDINGS)}
    dataset = create_dataset("folder", root=SHARED / "fair_buildings", **options)
    assert len(dataset) == 39
    for index in range(0, len(dataset), 4):
        sample = dataset[index]
        assert sample["image"].shape == (3, 256, 256)
        assert set(sample["mask"].unique().tolist()) <= {0, 1, IGNORE}
