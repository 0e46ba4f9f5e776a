"""The cache of a teacher's maps: the same bits, nobody asked, and damage that no run notices."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rsmodels.files import atomic_path
from rsmodels.registry import Preprocessing
from rsmodels.training.config import TrainConfig
from rsmodels.training.teacher import FrozenTeacher
from rsmodels.training.trainer import train

PREPROCESSING = Preprocessing((1.0, 2.0, 3.0), (2.0, 2.0, 2.0))
MakeConfig = Callable[..., TrainConfig]


def ask(teacher: FrozenTeacher, raw: Tensor) -> list[Tensor]:
    return teacher(PREPROCESSING.normalize(raw), raw, PREPROCESSING)


@pytest.fixture
def raw() -> Tensor:
    return torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(3)).float()


@pytest.fixture
def cached(tmp_path: Path, tiny_teacher: Any) -> FrozenTeacher:
    return FrozenTeacher(tiny_teacher(), {}, dtype=torch.float32, cache=tmp_path / "maps")


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) == 4 and all(
        torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(first, second, strict=True)
    )


def test_hits_are_the_same_bits_and_ask_nobody(
    cached: FrozenTeacher, raw: Tensor, asked: list[int], tiny_teacher: Any
) -> None:
    first = ask(cached, raw)
    assert asked == [1, 1, 1]
    assert same(ask(cached, raw), first) and len(asked) == 3
    # Another batch, in another order, with one that is new.
    batch = torch.stack([raw[2], raw[0] + 1, raw[1]])
    found = ask(cached, batch)
    assert len(asked) == 4
    assert all(torch.equal(level[[0, 2]], before[[2, 1]]) for level, before in zip(found, first, strict=True))
    uncached = FrozenTeacher(tiny_teacher(), {}, dtype=torch.float32)
    for level, exact in zip(first, ask(uncached, raw), strict=True):
        torch.testing.assert_close(level, exact)


def test_bf16_maps_keep_their_bits(tmp_path: Path, raw: Tensor, asked: list[int], tiny_teacher: Any) -> None:
    teacher = FrozenTeacher(tiny_teacher(), {}, dtype=torch.bfloat16, cache=tmp_path)
    assert same(ask(teacher, raw), ask(teacher, raw)) and len(asked) == 3
    exact = FrozenTeacher(tiny_teacher(), {}, dtype=torch.float32, cache=tmp_path)
    assert not same(ask(exact, raw), ask(teacher, raw)) and len(asked) == 6, "one folder, two computations"


def files(teacher: FrozenTeacher) -> list[Path]:
    assert teacher.cache is not None
    return sorted(teacher.cache.folder.rglob("*.safetensors"))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """The same bytes of maps under another header."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(change(load_file(file)), file, metadata)


def other_dtype(file: Path) -> None:
    rewrite(file, lambda maps: {name: value.view(torch.int32) for name, value in maps.items()})


def other_shape(file: Path) -> None:
    rewrite(file, lambda maps: {name: value.flatten(1) for name, value in maps.items()})


def no_maps(file: Path) -> None:
    save_file({}, file, {"crc32": "0"})


@pytest.mark.parametrize("damage", [cut, flip, empty, other_dtype, other_shape, no_maps])
def test_a_damaged_file_is_computed_anew(
    cached: FrozenTeacher, raw: Tensor, asked: list[int], damage: Callable[[Path], None]
) -> None:
    first = ask(cached, raw)
    file = files(cached)[1]
    whole = file.read_bytes()
    damage(file)
    assert same(ask(cached, raw), first) and len(asked) == 4
    assert file.read_bytes() == whole


def test_a_full_disk_ends_the_keeping_and_not_the_run(
    cached: FrozenTeacher, raw: Tensor, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "no space left on the disk")

    monkeypatch.setattr("rsmodels.training.teacher.MapCache.write", full)
    with pytest.warns(UserWarning, match="--teacher-cache: .*no space left") as warned:
        first = ask(cached, raw)
    assert len(warned) == 1 and cached.cache is None
    for level, again in zip(first, ask(cached, raw), strict=True):
        torch.testing.assert_close(level, again)


def test_what_a_killed_write_left_is_no_hit(cached: FrozenTeacher, raw: Tensor, asked: list[int]) -> None:
    first = ask(cached, raw)
    file = files(cached)[0]
    whole = file.read_bytes()
    with pytest.raises(KeyboardInterrupt), atomic_path(file) as temporary:
        left = temporary
        raise KeyboardInterrupt
    file.unlink()
    left.write_bytes(whole[:100])  # where SIGKILL leaves it
    assert same(ask(cached, raw), first) and len(asked) == 4
    assert file.read_bytes() == whole and left.read_bytes() == whole[:100]


def test_everything_that_decides_over_the_maps_is_in_the_key(
    cached: FrozenTeacher, raw: Tensor, tmp_path: Path, asked: list[int], tiny_teacher: Any
) -> None:
    ask(cached, raw)
    folder = tmp_path / "maps"
    others = [
        FrozenTeacher(tiny_teacher(seed=1), {}, dtype=torch.float32, cache=folder),
        FrozenTeacher(tiny_teacher(), {"fit": "resize"}, dtype=torch.float32, cache=folder),
    ]
    for count, other in enumerate(others, start=2):
        ask(other, raw)
        assert len(asked) == len(files(cached)) == 3 * count
    normalised = Preprocessing((1.0, 2.0, 3.5), (2.0, 2.0, 2.0))
    cached(normalised.normalize(raw), raw, normalised)
    assert len(asked) == 12


def test_a_run_with_a_cache_asks_once_per_tile(
    ktda: MakeConfig, asked: list[int], tmp_path: Path, losses: Any
) -> None:
    options: dict[str, Any] = {"steps": 4, "data_args": {"size": 32, "length": 6}}
    first = train(ktda(folder="first", teacher_cache=str(tmp_path / "maps"), **options))
    tiles = len(list((tmp_path / "maps").rglob("*.safetensors")))
    assert asked == [1] * tiles and tiles <= 6 * 3
    second = train(ktda(folder="second", teacher_cache=str(tmp_path / "maps"), **options))
    assert len(asked) == tiles, "runs share a folder"
    assert losses(first) == losses(second)
