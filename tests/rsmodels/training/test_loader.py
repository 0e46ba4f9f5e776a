from pathlib import Path
from typing import Any

import pytest
import torch

from rsmodels.data import IGNORE, SyntheticEarth
from rsmodels.training.build import measure_statistics
from rsmodels.training.config import LoaderConfig
from rsmodels.training.loader import Tiles, batches, make_loader
from rsmodels.training.parallel import Ranks
from rsmodels.training.sampler import Sample, ShardSampler, StepSampler

CPU = torch.device("cpu")


def small_set(**options: Any) -> SyntheticEarth:
    return SyntheticEarth(**{"size": 32, "length": 6, **options})


def first_batches(tiles: Tiles, workers: int = 0, steps: int = 4) -> list[dict[str, Any]]:
    sampler = StepSampler(len(tiles.dataset), seed=1, batch_size=3, steps=steps)
    return list(batches(make_loader(tiles, sampler, workers=workers, device=CPU)))


def same(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> bool:
    return all(
        a["name"] == b["name"] and torch.equal(a["image"], b["image"]) and torch.equal(a["mask"], b["mask"])
        for a, b in zip(first, second, strict=True)
    )


def test_batches_depend_on_the_position_not_on_the_process_that_reads_them() -> None:
    options = LoaderConfig(scale=(0.5, 2.0), max_class_share=0.75, flip=True, photometric=True)
    here = first_batches(Tiles(small_set(), (24, 24), options, seed=3))
    assert here[0]["image"].shape == (3, 3, 24, 24) and here[0]["mask"].shape == (3, 24, 24)
    assert same(here, first_batches(Tiles(small_set(), (24, 24), options, seed=3), workers=2))
    assert not same(here, first_batches(Tiles(small_set(), (24, 24), options, seed=4)))


def test_scaling_and_choosing_crops_change_training_tiles_only() -> None:
    dataset = small_set()
    recipe = LoaderConfig(scale=(0.5, 2.0), max_class_share=0.75)
    (plain,) = first_batches(Tiles(dataset, (24, 24), LoaderConfig(), seed=3), steps=1)
    for options in (LoaderConfig(scale=(0.5, 2.0)), LoaderConfig(max_class_share=0.4), recipe):
        (changed,) = first_batches(Tiles(dataset, (24, 24), options, seed=3), steps=1)
        assert changed["image"].shape == plain["image"].shape and changed["name"] == plain["name"]
        assert not torch.equal(changed["image"], plain["image"])
    validation = [Tiles(dataset, (24, 24), options) for options in (LoaderConfig(), recipe)]
    first, second = (tiles.__getitems__([Sample(0), Sample(1)]) for tiles in validation)
    assert isinstance(first, dict) and isinstance(second, dict) and same([first], [second])


def test_a_run_that_resumes_gets_the_same_tiles() -> None:
    options = LoaderConfig(scale=(0.5, 2.0), max_class_share=0.75, flip=True, photometric=True)
    whole = first_batches(Tiles(small_set(), (24, 24), options, seed=3), steps=5)
    tiles = Tiles(small_set(), (24, 24), options, seed=3)
    sampler = StepSampler(6, seed=1, batch_size=3, first_step=2, steps=5)
    assert same(whole[2:], list(batches(make_loader(tiles, sampler, workers=0, device=CPU))))


def test_reading_draws_nothing_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    first_batches(Tiles(small_set(), (24, 24), LoaderConfig(flip=True), seed=3))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_cache_changes_no_value_and_reads_each_tile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = first_batches(Tiles(small_set(), (32, 32), LoaderConfig(), seed=3))
    reads: list[int] = []
    read = SyntheticEarth.__getitem__
    monkeypatch.setattr(SyntheticEarth, "__getitem__", lambda self, i: reads.append(i) or read(self, i))
    cached = first_batches(Tiles(small_set(), (32, 32), LoaderConfig(cache=True), seed=3))
    assert same(plain, cached)
    assert sorted(reads) == list(range(6))


@pytest.mark.parametrize("value", [0.5, 300.0, -1.0])
def test_the_cache_keeps_values_that_no_byte_holds(value: float) -> None:
    dataset = small_set()
    sample = dataset[0]
    sample["image"][0, 0, 0] = value
    dataset.__class__ = type("Altered", (SyntheticEarth,), {"__getitem__": lambda self, index: sample})
    tiles = Tiles(dataset, (32, 32), LoaderConfig(cache=True))
    for _ in range(2):
        batch = tiles.__getitems__([Sample(0)])
        assert isinstance(batch, dict) and torch.equal(batch["image"][0], sample["image"])


def test_validation_tiles_are_the_centre_and_stand_ins_count_nothing() -> None:
    dataset = small_set(length=3)
    tiles = Tiles(dataset, (16, 16), LoaderConfig(flip=True))
    sampler = ShardSampler(3, batch_size=3, rank=1, world=2)
    (stand_in,) = list(batches(make_loader(tiles, sampler, workers=0, device=CPU)))
    assert (stand_in["mask"] == IGNORE).all()
    batch = tiles.__getitems__([Sample(1)])
    assert isinstance(batch, dict) and torch.equal(batch["mask"][0], dataset[1]["mask"][8:24, 8:24])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_tile_is_one_line_from_any_process(workers: int) -> None:
    class Broken(SyntheticEarth):
        def __getitem__(self, index: int) -> dict[str, Any]:
            raise FileNotFoundError(f"tile-{index}.tif: no such file")

    broken = Broken(size=32, length=4)
    with pytest.raises(FileNotFoundError) as error:
        first_batches(Tiles(broken, (32, 32), LoaderConfig(), seed=0), workers=workers)
    assert str(error.value).startswith("tile-") and "\n" not in str(error.value)


def test_tiles_of_different_band_counts_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    read = SyntheticEarth.__getitem__

    def reading(self: SyntheticEarth, index: int) -> dict[str, Any]:
        sample = read(self, index)
        return {**sample, "image": sample["image"][:1]} if index == 2 else sample

    monkeypatch.setattr(SyntheticEarth, "__getitem__", reading)
    with pytest.raises(ValueError, match=r"has [13] bands, .*choose common bands"):
        first_batches(Tiles(small_set(), (24, 24), LoaderConfig(), seed=3))


def test_statistics_are_those_of_the_pixels_with_data() -> None:
    dataset = small_set(length=4)
    samples = [dataset[index] for index in range(4)]
    # A nodata corner: 0 in every band and ignored. A black roof (0, but labelled) counts.
    samples[0]["image"][:, :10, :10], samples[0]["mask"][:10, :10] = 0, IGNORE
    samples[1]["image"][:, :3, :3] = 0
    dataset.__class__ = type("Altered", (SyntheticEarth,), {"__getitem__": lambda self, i: samples[i]})
    mean, std = measure_statistics(dataset, Ranks(0, 1, CPU))
    kept = torch.cat(
        [samples[0]["image"].flatten(1)[:, (samples[0]["mask"] != IGNORE).flatten()]]
        + [sample["image"].flatten(1) for sample in samples[1:]],
        dim=1,
    ).double()
    assert mean == pytest.approx(kept.mean(1).tolist(), rel=1e-9)
    assert std == pytest.approx(kept.std(1, correction=0).tolist(), rel=1e-9)


def test_a_band_of_one_value_cannot_be_normalised(tmp_path: Path) -> None:
    dataset = small_set(length=1)
    sample = dataset[0]
    sample["image"][1] = 7
    dataset.__class__ = type("Altered", (SyntheticEarth,), {"__getitem__": lambda self, index: sample})
    with pytest.raises(ValueError, match="band 2 has one value everywhere"):
        measure_statistics(dataset, Ranks(0, 1, CPU))
