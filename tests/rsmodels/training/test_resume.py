"""Runs that go on: from which checkpoint, with which options, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rsmodels
from rsmodels.training.checkpoint import newest_first
from rsmodels.training.config import TrainConfig
from rsmodels.training.trainer import train

MakeConfig = Callable[..., TrainConfig]


def test_resume_of_a_finished_run_and_of_a_longer_one(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str], log_of: Any
) -> None:
    run = train(make_config(steps=2))
    train(make_config(steps=2, resume="auto"))
    assert [line["step"] for line in log_of(run)] == [1, 2]
    train(make_config(steps=4, resume="auto", lr=5e-4))
    assert [line["step"] for line in log_of(run)] == [1, 2, 3, 4]
    said = capsys.readouterr().err
    assert "resumed from" in said and "changed since: --optim.lr 0.001 -> 0.0005" in said


def test_a_run_that_goes_on_in_another_folder_has_a_best_of_its_own(make_config: MakeConfig) -> None:
    first = train(make_config(steps=2, validate_every=1))
    state = json.loads((first / "checkpoints" / "step-2" / "state.json").read_text())
    state["best"]["loss"] = -1.0  # nothing that follows is better
    (first / "checkpoints" / "step-2" / "state.json").write_text(json.dumps(state))
    second = train(make_config(folder="other", steps=3, resume=str(first)))
    assert (second / "best" / "model.json").is_file()


def test_a_finished_run_has_nothing_to_do_in_another_folder(make_config: MakeConfig, tmp_path: Path) -> None:
    first = train(make_config(steps=1))
    with pytest.raises(
        ValueError, match=r"step-1: its run is at step 1 and this one ends at 1,.* more --steps"
    ):
        train(make_config(folder="other", steps=1, resume=str(first)))
    assert not (tmp_path / "other").exists()


def test_a_path_to_resume_from_goes_on_in_its_own_folder(make_config: MakeConfig, log_of: Any) -> None:
    run = train(make_config(steps=2))
    again = replace(make_config(steps=3), run_dir=None, resume=str(run / "checkpoints" / "step-2"))
    assert train(again) == run
    assert [line["step"] for line in log_of(run)] == [1, 2, 3]


def test_another_runs_folder_is_not_resumed_into(make_config: MakeConfig) -> None:
    first, second = (train(make_config(folder=name, steps=1)) for name in ("first", "second"))
    before = {path: path.stat().st_mtime_ns for path in second.rglob("*")}
    with pytest.raises(ValueError, match=r"already holds another run \(step-1\).*--resume auto") as error:
        train(make_config(folder="second", steps=2, resume=str(first)))
    assert "\n" not in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in second.rglob("*")} == before


def test_resume_says_what_computes_otherwise(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(make_config(steps=1))
    file = run / "checkpoints" / "step-1" / "state.json"
    state = json.loads(file.read_text())
    record = state["kernels"]
    assert (record["ranks"], record["threads"]) == (1, torch.get_num_threads())
    record |= {"torch": "1.0", "backend": "cuda", "ranks": 8, "threads": 99}
    products = record["tuning"]["products"]
    products |= {"float32/forward/wide/large": "aten"}
    record["tuning"]["triton"] = {"90": {"version": "another"}}
    file.write_text(json.dumps(state))
    capsys.readouterr()
    train(make_config(steps=2, resume="auto"))
    said = capsys.readouterr().err
    for line in ("torch 1.0 -> ", "backend cuda -> auto", "ranks 8 -> 1", "threads 99 -> 1"):
        assert f"changed since: {line}" in said
    assert "the table of matrix products; the checkpoint's is used" in said
    assert "the tuned Triton configurations; the checkpoint's are used" in said
    assert "changed since: rskernels" not in said
    resumed = json.loads((run / "checkpoints" / "step-2" / "state.json").read_text())
    assert resumed["kernels"]["tuning"]["products"] == products
    train(make_config(steps=2, resume="auto"))
    assert "last bits" not in capsys.readouterr().err


def test_auto_starts_where_there_is_nothing(make_config: MakeConfig, log_of: Any) -> None:
    assert [line["step"] for line in log_of(train(make_config(steps=2, resume="auto")))] == [1, 2]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str], weights_of: Any, same_weights: Any
) -> None:
    whole = weights_of(train(make_config(folder="whole", steps=6, checkpoint_every=2)))
    run = train(make_config(steps=6, checkpoint_every=2))
    newest = newest_first(run / "checkpoints")[0]
    file = next(newest.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1000])
    train(make_config(steps=6, checkpoint_every=2, resume="auto"))
    said = capsys.readouterr().err
    assert f"{file} is damaged" in said and "taking the checkpoint before it" in said
    assert f"resumed from {run / 'checkpoints' / 'step-4'}" in said
    assert same_weights(weights_of(run), whole)


@pytest.mark.parametrize(
    "other, expected",
    [
        ({"method": "sam-lora"}, "model rs_sam_tiny, this run has sam_lora_tiny"),
        ({"model_args": {"lora_rank": 2}}, "arguments"),
        ({"data_args": {"size": 32, "length": 10, "classes": "road"}}, "classes"),
        ({"bands": (3, 2, 1)}, "bands"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    make_config: MakeConfig, other: dict[str, Any], expected: str
) -> None:
    train(make_config(steps=1))
    with pytest.raises(ValueError, match="step-1: was written with") as error:
        train(make_config(steps=2, resume="auto", **other))
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_resumed_run_needs_no_pretrained_file(
    make_config: MakeConfig, sam_checkpoint: Path, tmp_path: Path, weights_of: Any, same_weights: Any
) -> None:
    """Frozen weights are in the checkpoints; the hash of the file they came from stays on record."""
    base = tmp_path / "base.pth"
    base.write_bytes(sam_checkpoint.read_bytes())
    options = {
        "pretrained": str(base),
        "model_args": {"freeze_encoder": True, "embedding_dim": 8},
        "image_size": 64,
        "data_args": {"size": 64, "length": 10},
    }
    whole = train(make_config(folder="whole", steps=4, **options))
    run = train(make_config(steps=2, **options))
    base.unlink()
    train(make_config(steps=4, resume="auto", checkpoint_every=2, **options))
    assert (
        rsmodels.load_model(run / "best")[1]["base_weights"]
        == (rsmodels.load_model(whole / "best")[1]["base_weights"])
    )
    frozen, expected = (
        {
            key: value
            for key, value in weights_of(each).items()
            if key.startswith("encoder.") and "lora" not in key
        }
        for each in (run, whole)
    )
    assert frozen and same_weights(frozen, expected)
