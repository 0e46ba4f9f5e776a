"""Nothing is half-written, and nothing that was there is lost."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from rsmodels.files import atomic_directory, atomic_path, hold_folder, read_json, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    assert read_json(tmp_path / "a.json") == {"x": 1}
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(tmp_path / "a.json") == {"x": 1}
    assert names(tmp_path) == ["a.json"]


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, atomic_path(tmp_path / "a.bin"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "a.bin")
    assert names(tmp_path) == []


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with atomic_directory(tmp_path / "best") as temporary:
            (temporary / text).write_text(text)
    assert names(tmp_path) == ["best"] and names(tmp_path / "best") == ["two"]
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "best") as temporary:
        (temporary / "three").write_text("half")
        raise RuntimeError
    assert names(tmp_path) == ["best"] and names(tmp_path / "best") == ["two"]


def test_a_kill_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / ".best.old").mkdir()
    (tmp_path / ".best.old" / "weights").write_text("good")
    (tmp_path / ".best.tmp").mkdir()
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "best"):
        raise RuntimeError
    assert names(tmp_path) == ["best"] and names(tmp_path / "best") == ["weights"]


def test_json_that_is_not_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{half")
    with pytest.raises(ValueError, match=r"a\.json: not a readable JSON file"):
        read_json(tmp_path / "a.json")


def test_a_folder_is_written_by_one_process_at_a_time(tmp_path: Path, another_process_holds: Any) -> None:
    with (
        another_process_holds(hold_folder, tmp_path / "run") as other,
        pytest.raises(ValueError, match=rf"run: process {other} on .* is writing there"),
    ):
        hold_folder(tmp_path / "run")
    hold_folder(tmp_path / "run").close()
