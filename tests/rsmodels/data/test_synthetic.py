"""Synthetic scenes: pure functions of their key, exact labels, domains that change what they name."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import rasterio
import torch
from scipy import ndimage

from rsmodels.data import Domain, SyntheticEarth, create_dataset, write_scene
from rsmodels.data.schema import IGNORE
from rsmodels.data.synthetic import ALL_CLASSES, BANDS, CLIMATES, PLATFORMS, REGIONS
from rsmodels.data.synthetic.noise import level_of_share, smooth_noise
from rsmodels.data.synthetic.paint import BUILDING, ROAD, WATER
from rsmodels.data.synthetic.scene import render_scene

DIGEST = """
import hashlib
from rsmodels.data import SyntheticEarth
dataset = SyntheticEarth(seed=5, size=64, domain="region=coast,bands=irrg")
digest = hashlib.sha256()
for index in (3, 0, 3):
    digest.update(dataset[index]["image"].numpy().tobytes() + dataset[index]["mask"].numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.fixture(scope="module")
def scenes() -> list:
    return [render_scene((1, 0, index), 192, Domain()) for index in range(12)]


def same(first: dict, second: dict) -> bool:
    return torch.equal(first["image"], second["image"]) and torch.equal(first["mask"], second["mask"])


def test_a_sample_is_what_the_contract_says():
    dataset = create_dataset("synthetic", split="val", size=64)
    sample = dataset[7]
    assert sample["image"].shape == (3, 64, 64)
    assert (sample["image"].dtype, sample["mask"].dtype) == (torch.float32, torch.int64)
    assert sample["image"].min() >= 1
    assert sample["image"].max() <= 255
    assert sample["name"] == dataset.names[7] == "synthetic-val-0-000007"
    assert Domain.parse(sample["domain"]) == Domain()
    assert dataset.schema.classes == ("building", "road", "water", "field", "forest", "bare soil")
    assert dataset.schema.num_logits == 6
    assert len(dataset) == 100


def test_tiles_do_not_depend_on_order_or_on_the_object():
    forwards, backwards = (SyntheticEarth(seed=3, size=48) for _ in range(2))
    kept = [forwards[index] for index in range(4)]
    np.random.seed(1)
    assert all(same(backwards[index], kept[index]) for index in (3, 1, 0, 2, 3))


def test_tiles_are_equal_in_another_process():
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    run = subprocess.run(
        [sys.executable, "-c", DIGEST], capture_output=True, text=True, env=environment, check=True
    )
    digest = hashlib.sha256()
    dataset = SyntheticEarth(seed=5, size=64, domain=Domain(region="coast", bands="irrg"))
    for index in (3, 0, 3):
        digest.update(dataset[index]["image"].numpy().tobytes() + dataset[index]["mask"].numpy().tobytes())
    assert run.stdout.strip() == digest.hexdigest()


def test_seed_split_and_index_each_make_another_place():
    tiles = [
        SyntheticEarth(seed=seed, split=split, size=48)[index]["image"]
        for seed, split, index in itertools.product((0, 1), ("train", "val", "test"), (0, 1))
    ]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(tiles, 2))


def test_the_label_is_exact():
    """Where water ends in the label it ends in the picture, to the pixel."""
    domain = Domain(
        region="delta", platform="drone", climate="tropical"
    )  # no blur, much water, short shadows
    rims, neighbours = [], []
    for index in range(12):
        scene = render_scene((0, 0, index), 128, domain)
        water = (scene.classes == WATER) & ~scene.cloud
        core = ndimage.binary_erosion(water, border_value=1)
        if core.sum() < 100:
            continue
        difference = np.abs(scene.image[0] - np.median(scene.image[0][core]))
        rims.append(difference[water & ~core])
        neighbours.append(difference[ndimage.binary_dilation(water) & ~water])
    assert len(rims) >= 4
    assert np.median(np.concatenate(rims)) < 12  # noise and ripples
    assert np.median(np.concatenate(neighbours)) > 25


def test_every_class_occurs_and_none_swallows_the_rest(scenes):
    counts = np.bincount(np.concatenate([scene.classes.ravel() for scene in scenes]), minlength=6)
    shares = counts / counts.sum()
    assert shares.min() > 0.02
    assert shares.max() < 0.6


def test_roads_are_a_network_that_leaves_the_scene(scenes):
    for scene in scenes:
        road = scene.classes == ROAD
        labels, count = ndimage.label(road, structure=np.ones((3, 3)))
        sizes = np.bincount(labels.ravel())[1:]
        edges = set(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]).tolist())
        largest = int(sizes.argmax()) + 1
        assert all(part in edges or part == largest for part in range(1, count + 1))
        assert sizes.max() > 0.6 * sizes.sum()


def test_houses_are_whole_and_cast_shadows():
    scene = render_scene((1, 0, 4), 256, Domain(climate="boreal"))
    houses, count = ndimage.label(scene.classes == BUILDING)
    assert count > 5
    areas = np.bincount(houses.ravel())[1:]
    assert np.median(areas) > 25
    ring = ndimage.binary_dilation(houses > 0, iterations=4) & (houses == 0) & (scene.classes != ROAD)
    far = ~ndimage.binary_dilation(houses > 0, iterations=12)
    dark = np.percentile(scene.image[1][far], 5)
    assert (scene.image[1][ring] < dark).mean() > 0.1


def test_bands_choose_and_change_nothing_else():
    scenes = {bands: render_scene((0, 0, 1), 64, Domain(bands=bands)) for bands in BANDS}
    assert np.array_equal(scenes["rgb"].classes, scenes["irrg"].classes)
    assert np.array_equal(scenes["rgb"].image[:2], scenes["irrg"].image[1:])
    assert np.array_equal(scenes["rgbir"].image[3], scenes["irrg"].image[0])
    field = scenes["rgbir"].classes == ALL_CLASSES.index("field")
    assert scenes["rgbir"].image[3][field].mean() > scenes["rgbir"].image[0][field].mean() + 30


def test_bands_may_be_picked_as_from_a_file():
    domain = "bands=rgbir"
    whole, picked = (
        SyntheticEarth(size=32, domain=domain),
        SyntheticEarth(size=32, domain=domain, bands=[4, 1]),
    )
    assert torch.equal(picked[0]["image"], whole[0]["image"][[3, 0]])
    with pytest.raises(ValueError, match="has bands 1-3"):
        SyntheticEarth(size=32, bands=[4])[0]


@pytest.mark.parametrize("key", ["region", "platform", "climate"])
def test_every_domain_looks_different(key):
    tables = {"region": REGIONS, "platform": PLATFORMS, "climate": CLIMATES}
    assert len(tables[key]) >= 3
    means = []
    for value in tables[key]:
        tiles = [render_scene((0, 0, index), 96, Domain(**{key: value})) for index in range(6)]
        pixels = np.stack([tile.image for tile in tiles]).astype(float)
        grain = np.abs(np.diff(pixels, axis=-1)).mean()
        means.append(np.array([*pixels.mean((0, 2, 3)), 3 * grain]))
    for first, second in itertools.combinations(means, 2):
        assert np.abs(first - second).max() > 3


def test_domains_in_words():
    assert Domain.parse("region=coast, bands=irrg") == Domain(region="coast", bands="irrg")
    assert Domain.parse("") == Domain()
    for region, climate in itertools.product(REGIONS, CLIMATES):
        domain = Domain(region=region, climate=climate, platform="drone", bands="irrg")
        assert Domain.parse(str(domain)) == domain
    for text in ("coast", "region=coast,region=hills", "place=coast"):
        with pytest.raises(ValueError, match="not understood; write region="):
            Domain.parse(text)
    with pytest.raises(ValueError, match="region='mars' is unknown; known: plains, coast"):
        Domain.parse("region=mars")


def test_one_class_is_a_binary_task():
    dataset = SyntheticEarth(size=64, classes="road")
    assert (dataset.schema.classes, dataset.schema.num_logits) == (("background", "road"), 1)
    whole = SyntheticEarth(size=64)[3]["mask"]
    assert torch.equal(dataset[3]["mask"], (whole == ROAD).long())


def test_part_of_the_classes_leaves_a_background():
    dataset = SyntheticEarth(size=64, classes=["water", "building"])
    assert dataset.schema.classes == ("background", "water", "building")
    whole, mask = SyntheticEarth(size=64)[3]["mask"], dataset[3]["mask"]
    assert torch.equal(mask == 1, whole == WATER)
    assert torch.equal(mask == 2, whole == BUILDING)


def test_cloud_is_a_class_only_where_it_is_asked_for():
    domain = Domain(climate="tropical")
    dataset = SyntheticEarth(size=96, classes=ALL_CLASSES, domain=domain, length=12)
    assert dataset.schema.classes == ALL_CLASSES
    plain = SyntheticEarth(size=96, domain=domain)
    brighter = []
    for index in range(12):
        with_cloud, without = dataset[index], plain[index]
        cloud = with_cloud["mask"] == ALL_CLASSES.index("cloud")
        assert torch.equal(with_cloud["image"], without["image"])
        assert torch.equal(with_cloud["mask"][~cloud], without["mask"][~cloud])
        if 0.1 < cloud.float().mean() < 0.9:
            image = with_cloud["image"].mean(0)
            brighter.append((image[cloud].mean() - image[~cloud].mean()).item())
    assert brighter
    assert min(brighter) > 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": "/data"}, "has no files; leave root out"),
        ({"seed": -1}, "seed -1 is negative"),
        ({"size": 8}, "at least 16 pixels"),
        ({"length": 0}, "at least one tile"),
        ({"classes": "roads"}, "choose from building, road"),
        ({"classes": []}, "choose from building, road"),
        ({"domain": "region=mars"}, "region='mars' is unknown"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SyntheticEarth(**options)


def test_noise_has_the_share_above_a_level_that_its_name_says():
    rng = np.random.default_rng(0)
    noise = smooth_noise(rng, 512, 8)
    assert abs(noise.std() - 1) < 0.08
    for share in (0.1, 0.4, 0.8):
        assert abs((noise > level_of_share(share)).mean() - share) < 0.03


def test_tiles_are_made_in_milliseconds():
    """A thousand 256-pixel tiles take ten seconds; the bound leaves room for a slow, busy machine."""
    dataset = SyntheticEarth(size=256)
    dataset[0]
    seconds = []
    for index in range(1, 8):
        start = time.process_time()
        dataset[index]
        seconds.append(time.process_time() - start)
    assert np.median(seconds) < 0.05


def test_a_scene_on_disk(tmp_path):
    label_path = write_scene(tmp_path / "scene.tif", 600, seed=2, domain="region=delta,platform=satellite")
    assert label_path == tmp_path / "scene_label.tif"
    with rasterio.open(tmp_path / "scene.tif") as scene, rasterio.open(label_path) as label:
        assert (scene.count, scene.shape, scene.nodata, scene.crs.to_epsg()) == (3, (600, 600), 0, 32633)
        assert scene.res == (2.0, 2.0)
        assert scene.block_shapes[0] == (256, 256)
        assert scene.descriptions == ("red", "green", "blue")
        assert (label.transform, label.crs, label.nodata) == (scene.transform, scene.crs, IGNORE)
        image, ids = scene.read(), label.read(1)
        table = label.colormap(1)
    empty = (image == 0).any(0)
    assert np.array_equal(empty, (image == 0).all(0))
    assert np.array_equal(empty, ids == IGNORE)
    assert abs(empty.mean() - 0.08) < 0.005
    assert empty[0, 0]
    assert empty[-1, -1]
    assert set(np.unique(ids[~empty])) <= set(range(6))
    assert table[2][:3] == SyntheticEarth(size=32).schema.palette[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scene.tif", "scene_label.tif"]


def test_a_scene_may_be_full_and_of_other_bands_and_classes(tmp_path):
    label_path = write_scene(
        tmp_path / "s.tif", 256, domain=Domain(bands="rgbir"), classes="road", nodata_share=0.0
    )
    with rasterio.open(tmp_path / "s.tif") as scene, rasterio.open(label_path) as label:
        assert scene.count == 4
        assert (scene.read() > 0).all()
        assert set(np.unique(label.read(1))) == {0, 1}


@pytest.mark.parametrize(("options", "message"), [({"size": 64}, "256"), ({"nodata_share": 0.6}, "0.5")])
def test_scenes_that_cannot_be(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        write_scene(tmp_path / "s.tif", **options)
    assert not list(tmp_path.iterdir())
