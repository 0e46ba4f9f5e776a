import json
import math
from pathlib import Path

import pytest

from rsmodels.training.log import RunLog


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_a_resumed_log_reads_like_an_uninterrupted_one(tmp_path: Path) -> None:
    log = RunLog(tmp_path, first_step=0, steps=9, main=True)
    for step in (2, 4, 6):
        log.write("train", step, {"loss": 1 / step})
    log.close()
    with (tmp_path / "log.jsonl").open("a") as stream:
        stream.write('{"kind": "train", "st')  # killed while writing
    log = RunLog(tmp_path, first_step=4, steps=9, main=True)
    log.write("train", 6, {"loss": 0.5})
    log.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(2, 0.5), (4, 0.25), (6, 0.5)]


def test_a_new_run_starts_an_empty_log_and_other_ranks_are_silent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.jsonl").write_text('{"kind": "train", "step": 1}\n')
    log = RunLog(tmp_path, first_step=0, steps=9, main=False)
    log.write("train", 2, {"loss": 1.0})
    log.say("hello")
    log.close()
    assert capsys.readouterr().err == ""
    RunLog(tmp_path, first_step=0, steps=9, main=True).close()
    assert lines(tmp_path) == []


def test_a_line_is_strict_json_and_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, first_step=0, steps=9, main=True)
    log.write("validation", 3, {"loss": 0.25, "mean_iou": math.nan})
    log.close()
    assert (tmp_path / "log.jsonl").read_text() == (
        '{"kind": "validation", "step": 3, "loss": 0.25, "mean_iou": null}\n'
    )
    assert "validation 3: loss 0.25" in capsys.readouterr().err


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = RunLog(tmp_path, first_step=0, steps=9, main=True)
    log.write("train", 2, {"loss": 0.5, "lr": 0.1})
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["train/loss", "train/lr"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(2, 0.5)]
