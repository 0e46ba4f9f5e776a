"""Validation that has nothing to measure: what a run says of it, and what it writes."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rsmodels.data import IGNORE, SyntheticEarth
from rsmodels.training.config import TrainConfig
from rsmodels.training.parallel import Ranks
from rsmodels.training.trainer import Trainer, train

MakeConfig = Callable[..., TrainConfig]


def hide_labels(monkeypatch: pytest.MonkeyPatch, *, but: int | None = None) -> None:
    """Let every tile of the validation split have no label, `but` one, which has them in its first rows."""
    read = SyntheticEarth.__getitem__

    def reading(self: SyntheticEarth, index: int) -> dict[str, Any]:
        sample = read(self, index)
        if self.split == "val":
            sample["mask"][8 if index == but else 0 :] = IGNORE
        return sample

    monkeypatch.setattr(SyntheticEarth, "__getitem__", reading)


def test_a_validation_split_without_labels_ends_the_run_before_its_first_step(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide_labels(monkeypatch)
    with pytest.raises(ValueError, match=r"every pixel of its val split is 255.*32x32 pixels") as error:
        train(make_config(steps=1))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_one_labelled_tile_is_enough(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_labels(monkeypatch, but=1)
    assert (train(make_config(steps=1)) / "best" / "model.json").is_file()


def test_labels_outside_of_the_crop_do_not_count(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide_labels(monkeypatch, but=1)  # eight rows of 64, of which the middle 32 are seen
    with pytest.raises(ValueError, match="32x32 pixels at the centre"):
        train(make_config(steps=1, data_args={"size": 64, "length": 10}))


def test_a_mean_iou_that_does_not_exist_is_null(make_config: MakeConfig) -> None:
    trainer = Trainer(make_config(), Ranks(0, 1, torch.device("cpu")))
    trainer.best = {"loss": 0.5, "step": 1}
    trainer._save_best(math.nan)
    trainer.log.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (trainer.folder / "best" / "model.json").read_text()
    assert json.loads(text, parse_constant=refuse)["training"]["validation_mean_iou"] is None
