"""L8 Biome in its two layouts, on miniatures: the tiles of KTDA's authors, and scenes."""

from __future__ import annotations

import json
import pickle
import shutil
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image

import rsmodels
from rsmodels.cli import main
from rsmodels.data import check_dataset, create_dataset, dataset_options
from rsmodels.data.base import SPLITS
from rsmodels.data.schema import IGNORE

SIZE = 16
HEIGHT, WIDTH = 52, 85  # 3 x 5 patches of 16, and a rim that holds no whole one
FIRST, SECOND = "LC80420082013220LGN00", "LC80070662014234LGN00"
CODES = np.array([128, 64, 192, 255], np.uint8)  # of clear, shadow, thin cloud, cloud


def write(path: Path, bands: np.ndarray, **profile: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = bands[None] if bands.ndim == 2 else bands
    count, height, width = bands.shape
    profile = {"driver": "GTiff", "dtype": bands.dtype, **profile}
    with rasterio.open(path, "w", count=count, height=height, width=width, **profile) as target:
        target.write(bands)


def make_mask(seed: int) -> np.ndarray:
    """Random codes; the first patch is fill, the second fill but for one pixel."""
    mask = np.random.default_rng(seed).choice(CODES, (HEIGHT, WIDTH))
    mask[:SIZE, : 2 * SIZE] = 0
    mask[SIZE - 1, 2 * SIZE - 1] = 64
    return mask


def make_bands(mask: np.ndarray, count: int = 11) -> np.ndarray:
    """Band n holds 1000 n + a random number, as 16 bits; fill is 0."""
    noise = np.random.default_rng(int(mask.sum())).integers(0, 1000, mask.shape)
    return np.where(mask > 0, 1000 * np.arange(1, count + 1)[:, None, None] + noise, 0).astype(np.uint16)


def write_scene(folder: Path, name: str, seed: int, *, stack: bool = True, bands: Sequence[int] = ()) -> None:
    mask = make_mask(seed)
    pixels = make_bands(mask)
    write(folder / name / f"{name}_fixedmask.TIF", mask)
    if stack:
        write(folder / name / f"{name}.TIF", pixels)
    for band in bands:
        write(folder / name / f"{name}_B{band}.TIF", pixels[band - 1])


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    write_scene(tmp_path / "barren", FIRST, 1)
    write_scene(tmp_path / "forest", SECOND, 2)
    (tmp_path / "barren" / FIRST / f"{FIRST}_MTL.txt").write_text("GROUP = L1_METADATA_FILE")
    write(tmp_path / "barren" / FIRST / f"{FIRST}_BQA.TIF", np.zeros((4, 4), np.uint16))
    return tmp_path


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        for kind in ("img_dir", "ann_dir"):
            (tmp_path / kind / split).mkdir(parents=True)
        for index in range(count):
            biome = "snow_ice" if index % 2 else "water"
            name = f"{biome}_{FIRST}_patch_{512 * index}_{512 * SPLITS.index(split)}.png"
            Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(
                tmp_path / "img_dir" / split / name
            )
            labels = np.arange(SIZE * SIZE, dtype=np.uint8).reshape(SIZE, SIZE) % 4
            Image.fromarray(labels).save(tmp_path / "ann_dir" / split / name)
    return tmp_path


def open_scenes(root: Path, split: str = "train", **options: object):  # type: ignore[no-untyped-def]
    return create_dataset("l8-biome", root=root, split=split, size=SIZE, **options)


def all_samples(root: Path, **options: object) -> dict[str, dict]:
    sets = [open_scenes(root, split, **options) for split in SPLITS]
    samples = [dataset[index] for dataset in sets for index in range(len(dataset))]
    return {sample["name"]: sample for sample in samples}


# ------------------------------------------------------------------------------------------------- scenes


def test_patches_of_scenes_are_drawn_6_2_2(scenes: Path) -> None:
    names = {split: open_scenes(scenes, split).names for split in SPLITS}
    assert [len(names[split]) for split in SPLITS] == [17, 5, 6]  # of 2 x 14: one patch of each is fill
    grid = {(top, left) for top in (0, 16, 32) for left in (0, 16, 32, 48, 64)} - {(0, 0)}
    expected = {f"{scene}_patch_{top}_{left}" for scene in (FIRST, SECOND) for top, left in grid}
    assert set().union(*names.values()) == expected
    assert open_scenes(scenes).names == names["train"]
    assert open_scenes(scenes, seed=1).names != names["train"]


def test_a_patch_is_a_window_of_its_scene(scenes: Path) -> None:
    samples = all_samples(scenes)
    mask = make_mask(1)
    pixels = make_bands(mask).astype(np.float32)
    for top, left in ((0, 16), (32, 64), (16, 0)):
        sample = samples[f"{FIRST}_patch_{top}_{left}"]
        rows, columns = slice(top, top + SIZE), slice(left, left + SIZE)
        np.testing.assert_array_equal(sample["image"], pixels[[3, 2, 1], rows, columns])  # red, green, blue
        for code, train in ((0, IGNORE), (128, 0), (64, 1), (192, 2), (255, 3)):
            np.testing.assert_array_equal(sample["mask"] == train, mask[rows, columns] == code)
        assert sample["domain"] == "barren"
    assert samples[f"{SECOND}_patch_0_16"]["domain"] == "forest"
    assert int((samples[f"{FIRST}_patch_0_16"]["mask"] != IGNORE).sum()) == 1


def test_stacks_and_files_per_band_are_read_alike(scenes: Path, tmp_path: Path) -> None:
    """The USGS's own copy: a file per band, masks in ENVI format, no biomes. The draw is the same."""
    usgs = tmp_path / "usgs"
    for seed, name in ((1, FIRST), (2, SECOND)):
        write_scene(usgs / "BC", name, seed, stack=False, bands=range(1, 12))
        mask = usgs / "BC" / name / f"{name}_fixedmask.TIF"
        write(mask.with_suffix(".img"), make_mask(seed), driver="ENVI")
        mask.unlink()
    for folder in ("barren", "forest"):
        shutil.move(scenes / folder, tmp_path / "stacks" / folder)
    for split in SPLITS:
        ours, theirs = open_scenes(tmp_path / "stacks", split), open_scenes(usgs, split)
        assert ours.names == theirs.names
        assert theirs.domain_of(0) == "l8-biome"
        for index in (0, len(ours) - 1):
            assert torch.equal(ours[index]["image"], theirs[index]["image"])
            assert torch.equal(ours[index]["mask"], theirs[index]["mask"])
    ours, theirs = (open_scenes(root, bands=[10, 1]) for root in (tmp_path / "stacks", usgs))
    assert torch.equal(ours[0]["image"], theirs[0]["image"])


def test_bands_are_landsats(scenes: Path) -> None:
    sample = open_scenes(scenes, bands=[11, 5])[0]
    labelled = sample["mask"] != IGNORE
    assert (sample["image"][:, labelled] // 1000).unique(dim=1).T.tolist() == [[11, 5]]
    assert (open_scenes(scenes).bands, open_scenes(scenes, bands=[11, 5]).bands) == ((4, 3, 2), (11, 5))
    for bands in ([12], [0, 1], []):
        with pytest.raises(ValueError, match="Landsat 8 has bands 1 to 11"):
            open_scenes(scenes, bands=bands)


def test_a_scene_is_never_in_memory_whole(tmp_path: Path) -> None:
    side = 1024
    mask = np.full((side, side), 128, np.uint8)
    folder = tmp_path / FIRST
    write(folder / f"{FIRST}_fixedmask.TIF", mask, compress="deflate")
    write(folder / f"{FIRST}.TIF", np.ones((11, side, side), np.uint16), compress="deflate", tiled=True)
    tracemalloc.start()
    dataset = create_dataset("l8-biome", root=tmp_path, size=32, bands=range(1, 12))
    listing = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    dataset.read_image(0), dataset.read_mask(0)
    reading = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert listing < mask.nbytes and reading < 32 * 32 * 11 * 2 * 4, (listing, reading)


def test_a_mask_that_changed_is_read_again(scenes: Path) -> None:
    assert sum(len(open_scenes(scenes, split)) for split in SPLITS) == 28
    write(scenes / "barren" / FIRST / f"{FIRST}_fixedmask.TIF", np.full((HEIGHT, WIDTH), 128, np.uint8))
    assert sum(len(open_scenes(scenes, split)) for split in SPLITS) == 29


def test_scenes_travel_to_reader_processes(scenes: Path) -> None:
    dataset = open_scenes(scenes)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[3]["image"], dataset[3]["image"])


def fill(path: Path) -> None:
    write(path, np.zeros((HEIGHT, WIDTH), np.uint8))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("_fixedmask", Path.unlink, r"LGN00\.TIF: the image has no mask; a scene has LC8.*_fixedmask\.TIF"),
        ("", Path.unlink, r"_fixedmask\.TIF: the mask has no image"),
        ("_fixedmask", truncate, r"_fixedmask\.TIF: cannot be read"),
        ("", lambda path: path.write_bytes(b""), r"LGN00\.TIF: the file is empty"),
        ("", lambda path: write(path, np.ones((11, 9, 8), np.uint16)), r"image is 9x8 pixels, its mask is"),
        ("", lambda path: write(path, np.ones((10, HEIGHT, WIDTH), np.uint16)), "has 10 bands, expected 11"),
        (
            "_fixedmask",  # what torchgeo's reader makes of the codes
            lambda path: write(path, np.eye(HEIGHT, WIDTH, dtype=np.uint8) * 2),
            r"_fixedmask\.TIF \(rows 0-15, columns 0-79\): unknown label 2 \(16 pixels\); allowed: 0",
        ),
    ],
)
def test_a_scene_that_cannot_be_used_is_one_line(
    scenes: Path, file: str, change: Callable[[Path], None], message: str
) -> None:
    change(scenes / "forest" / SECOND / f"{SECOND}{file}.TIF")
    with pytest.raises(ValueError, match=message):
        open_scenes(scenes)
    report = check_dataset("l8-biome", scenes, size=SIZE)
    assert len(report.errors) == 1 and SECOND in report.errors[0]
    assert sum(report.tiles.values()) == 14  # the other scene is looked at all the same


def test_single_bands_must_be_there_and_fit(tmp_path: Path) -> None:
    write_scene(tmp_path, FIRST, 1, stack=False, bands=(2, 3, 4))
    assert len(open_scenes(tmp_path)) == 8
    with pytest.raises(ValueError, match=r"LGN00_B5\.TIF: no such file; the scene lacks band 5"):
        open_scenes(tmp_path, bands=[5])
    write(tmp_path / FIRST / f"{FIRST}_B8.TIF", np.ones((2 * HEIGHT, 2 * WIDTH), np.uint16))
    with pytest.raises(ValueError, match=r"B8\.TIF: the image is 104x170 .* 52x85.*band 8, panchromatic"):
        open_scenes(tmp_path, bands=[4, 8])


def test_scenes_that_hold_nothing(scenes: Path) -> None:
    with pytest.raises(ValueError, match=r"52x85 pixels hold no patch of 512; choose a smaller --data"):
        create_dataset("l8-biome", root=scenes)
    with pytest.raises(ValueError, match="size 0 is not a number of pixels"):
        create_dataset("l8-biome", root=scenes, size=0)
    for path in scenes.rglob("*_fixedmask.TIF"):
        fill(path)
    with pytest.raises(ValueError, match="split 'train' of l8-biome is empty"):
        open_scenes(scenes)


def test_a_scene_is_there_once(scenes: Path) -> None:
    shutil.copytree(scenes / "forest", scenes / "copy")
    with pytest.raises(ValueError, match="is the same part of this scene; keep one of the two"):
        open_scenes(scenes)


def test_a_damaged_image_is_found(scenes: Path) -> None:
    truncate(scenes / "forest" / SECOND / f"{SECOND}.TIF")
    report = check_dataset("l8-biome", scenes, size=SIZE)
    assert sum(report.tiles.values()) == 28 and len(report.errors) == 28 - sum(report.bands.values()) > 0
    assert all(f"{SECOND}.TIF: cannot be read" in error for error in report.errors)


# -------------------------------------------------------------------------------------------------- tiles


def test_tiles_are_read_as_given(tiles: Path) -> None:
    sets = {split: create_dataset("l8-biome", root=tiles, split=split) for split in SPLITS}
    assert [len(sets[split]) for split in SPLITS] == [4, 2, 2]
    sample = sets["train"][0]
    assert sample["image"].shape == (3, SIZE, SIZE) and sets["train"].bands is None
    assert sample["mask"][0, :4].tolist() == [0, 1, 2, 3]
    assert sample["name"].startswith("snow_ice_LC8") and sample["domain"] == "snow_ice"
    assert sets["train"].schema.classes == ("clear", "shadow", "thin cloud", "cloud")
    assert all(dataset.notes == () for dataset in sets.values())
    assert dataset_options("l8-biome") == ["size", "seed", "bands"]
    report = check_dataset("l8-biome", tiles)
    assert (report.errors, report.warnings) == ([], [])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.tile(CODES, (SIZE, SIZE // 4)), "unknown label 64 .*allowed: 0 clear, 1 shadow, 2 thin cloud"),
        (np.eye(SIZE, dtype=np.uint8) * 255, "the mask holds 0/255, a two-class mask"),
        (np.tile(np.array([0, 85, 170, 255], np.uint8), (SIZE, SIZE // 4)), "unknown label 85"),
        (np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8), "the mask holds colours"),
    ],
)
def test_tiles_of_another_coding_are_refused(tiles: Path, labels: np.ndarray, message: str) -> None:
    """The codes of the scenes, a two-class mask, the authors' greys, and colours."""
    path = sorted((tiles / "ann_dir/train").iterdir())[0]
    Image.fromarray(labels).save(path)
    with pytest.raises(ValueError, match=rf"{path.name}: {message}"):
        create_dataset("l8-biome", root=tiles)[0]


def test_palette_tiles_count_by_index(tiles: Path) -> None:
    path = sorted((tiles / "ann_dir/train").iterdir())[0]
    before = create_dataset("l8-biome", root=tiles)[0]["mask"]
    image = Image.open(path)
    image.putpalette([0, 0, 0, 85, 85, 85, 170, 170, 170, 255, 255, 255])
    image.save(path)
    assert torch.equal(create_dataset("l8-biome", root=tiles)[0]["mask"], before)


def test_a_test_split_that_is_val_is_kept_and_said(tiles: Path) -> None:
    for kind in ("img_dir", "ann_dir"):
        shutil.rmtree(tiles / kind / "test")
        shutil.copytree(tiles / kind / "val", tiles / kind / "test")
    dataset = create_dataset("l8-biome", root=tiles, split="test")
    assert len(dataset) == 2 and dataset.notes[0].startswith("2 of 2 test tiles are validation tiles, too")
    report = check_dataset("l8-biome", tiles)
    assert report.ok and dataset.notes[0] in report.warnings


def test_check_data_finds_what_is_wrong_with_tiles(tiles: Path) -> None:
    first, second, third, fourth = sorted((tiles / "ann_dir/train").iterdir())
    first.unlink()
    Image.fromarray(np.full((SIZE, SIZE), 4, np.uint8)).save(second)
    Image.fromarray(np.zeros((SIZE, 4), np.uint8)).save(third)
    fourth.write_bytes(fourth.read_bytes()[:40])
    errors = "\n".join(check_dataset("l8-biome", tiles).errors)
    for part in ("the image has no mask", "unknown label 4", "its mask is 16x4", "cannot be read"):
        assert part in errors
    assert errors.count("\n") == 3
    assert main(["check-data", "l8-biome", "--root", str(tiles)]) == 1


def test_the_layout_is_never_guessed(tiles: Path, tmp_path: Path) -> None:
    write_scene(tiles / "barren", FIRST, 1)
    with pytest.raises(ValueError, match=r"holds tiles \(img_dir\) and scenes \(LC8.*\); give the folder"):
        create_dataset("l8-biome", root=tiles)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"neither tiles \(img_dir/train, ann_dir/train\) nor scenes"):
        create_dataset("l8-biome", root=tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        create_dataset("l8-biome", root=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="--root"):
        create_dataset("l8-biome")


def test_scenes_are_evaluated_biome_by_biome(scenes: Path, tmp_path: Path) -> None:
    dataset = open_scenes(scenes, "test")
    schema = dataset.schema.to_dict()
    model = rsmodels.create_model("rs_sam_tiny", num_classes=4, image_size=32)
    rsmodels.save_model(model, tmp_path / "run/best", {key: schema[key] for key in ("classes", "palette")})
    words = f"evaluate --model {tmp_path / 'run/best'} --data l8-biome --root {scenes} --tiles 1 --device cpu"
    assert main([*words.split(), "--data-args.size", str(SIZE)]) == 0
    metrics = json.loads((tmp_path / "run/report/metrics.json").read_text())
    assert set(metrics["per_domain"]) == {"barren", "forest"}
    assert metrics["pixels"] == sum(int((dataset[i]["mask"] != IGNORE).sum()) for i in range(len(dataset)))
