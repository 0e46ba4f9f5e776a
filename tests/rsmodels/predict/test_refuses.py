"""What stops a prediction, in a line, and what is left then: nothing, or the map of before."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rsmodels
import rsmodels.predict
from rsmodels.predict import PredictConfig, predict, predict_scenes


def test_weights_that_are_not_finite_write_no_map(saved: Path, tmp_path: Path, random_scene: Any) -> None:
    shutil.copytree(saved, tmp_path / "best")
    model, info = rsmodels.load_model(tmp_path / "best")
    with torch.no_grad():
        next(model.neck.parameters()).fill_(float("nan"))
    rsmodels.save_model(model, tmp_path / "best", {"classes": info["classes"], "palette": info["palette"]})
    scene = random_scene(64, 64)
    with pytest.raises(ValueError, match="the model's output is not finite"):
        predict(scene, model=tmp_path / "best", output=tmp_path / "map.tif")
    assert not (tmp_path / "map.tif").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": 1.0}, "overlap 1.0"),
        ({"batch_size": 0}, "batch size 0"),
        ({"device": "tpu9"}, "'tpu9' is not known"),
        ({"dtype": "fp16"}, "'fp16' is not known"),
        ({"bands": [1, 2]}, "takes 3 bands, not 2"),
    ],
)
def test_bad_options_leave_nothing(
    tmp_path: Path, use: Callable, options: dict, message: str, random_scene: Any
) -> None:
    scene = random_scene(40, 40)
    with pytest.raises(ValueError, match=message):
        predict(scene, model="any", output=tmp_path / "map.tif", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["scene.tif"]


def test_the_scene_is_never_overwritten(tmp_path: Path, use: Callable, random_scene: Any) -> None:
    scene = random_scene(40, 40)
    with pytest.raises(ValueError, match="is the scene itself"):
        predict(scene, model="any", output=tmp_path / "." / "scene.tif")
    with pytest.raises(ValueError, match="a file each"):
        predict(scene, model="any", output=tmp_path / "m.tif", probabilities=tmp_path / "m.tif")


def test_ctrl_c_leaves_the_old_map(
    tmp_path: Path, use: Callable, pixel_model: Any, random_scene: Any
) -> None:
    class Interrupted(pixel_model):
        calls = 0

        def forward(self, images: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt
            return super().forward(images)

    use(Interrupted())
    scene = random_scene(300, 300)
    (tmp_path / "map.tif").write_text("the old map")
    with pytest.raises(KeyboardInterrupt):
        predict(scene, model="any", output=tmp_path / "map.tif", probabilities=tmp_path / "p.tif")
    assert (tmp_path / "map.tif").read_text() == "the old map"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.tif", "scene.tif"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, use: Callable, random_scene: Any) -> None:
    """A limit on the size of files stands in for the full disk: writing fails in the same place."""
    scene = random_scene(600, 600)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=r"map.tif: cannot be written .* MiB are free there") as caught:
            predict(scene, model="any", output=tmp_path / "map.tif")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["scene.tif"]


def test_several_scenes_go_to_a_folder_and_one_bad_one_stops_no_other(
    tmp_path: Path, use: Callable, random_scene: Any
) -> None:
    good = [str(random_scene(40, 40, f"{name}.tif")) for name in ("a", "b")]
    (tmp_path / "bad.tif").write_text("not a raster")
    errors: list[Exception] = []
    config = PredictConfig(
        scenes=[good[0], str(tmp_path / "bad.tif"), good[1]], model="any", output=str(tmp_path / "maps")
    )
    assert predict_scenes(config, errors.append) == 1
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == ["a.tif", "b.tif"]
    assert len(errors) == 1 and "bad.tif" in str(errors[0])
    shutil.copy(good[0], tmp_path / "maps" / "a.tif")
    config.scenes = [good[0], str(tmp_path / "maps" / "a.tif")]
    with pytest.raises(ValueError, match=r"a.tif: two of the scenes"):
        predict_scenes(config, errors.append)
    config.output = good[1]
    with pytest.raises(ValueError, match="is a file; 2 scenes need a folder"):
        predict_scenes(config, errors.append)
