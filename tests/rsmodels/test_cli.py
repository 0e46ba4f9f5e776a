"""The command line: what it understands, what it prints when it does not, and its exit codes."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.run import get_args_parser

import rsmodels
from rsmodels.cli import COMMANDS, commands, main
from rsmodels.cli.options import UsageError, parse
from rsmodels.evaluation.evaluate import EvaluateConfig
from rsmodels.predict import PredictConfig
from rsmodels.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]


# -------------------------------------------------------------------------------------------- understanding


def test_help_lists_the_commands(capsys: pytest.CaptureFixture) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert rsmodels.__version__ in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_spells_options_with_hyphens(command: str, capsys: pytest.CaptureFixture) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    options = {word.strip("[],") for word in out.split() if word.strip("[],").startswith("--")}
    assert "--debug" in options
    assert not [option for option in options if "_" in option]


def test_both_spellings_nested_options_flags_and_lists() -> None:
    words = "--batch-size 3 --image_size=64 --optim.lr 1e-4 --optim.weight-decay 0"
    words += " --bands 3,2,1 --debug --steps 5"
    config = parse("train", "train", commands.train, words.split())
    assert isinstance(config, TrainConfig)
    assert (config.batch_size, config.image_size, config.steps, config.debug) == (3, 64, 5, True)
    assert config.optim.lr == 1e-4 and config.optim.weight_decay == 0
    assert tuple(config.bands or ()) == (3, 2, 1)
    assert tuple(parse("train", "train", commands.train, ["--bands", "4"]).bands or ()) == (4,)
    assert tuple(parse("train", "train", commands.train, ["--bands=4"]).bands or ()) == (4,)
    betas = parse("train", "train", commands.train, ["--optim.betas", "0.9,0.95"]).optim.betas
    assert tuple(betas) == (0.9, 0.95)
    assert parse("train", "train", commands.train, ["--debug", "false"]).debug is False
    assert parse("train", "train", commands.train, ["--debug=true"]).debug is True
    for words, value in (("", True), ("true", True), ("false", False), ("null", None)):
        given = ["--activation-checkpointing", *words.split(), "--steps", "1"]
        assert parse("train", "train", commands.train, given).activation_checkpointing is value


def test_torchrun_lets_every_option_of_train_pass(capsys: pytest.CaptureFixture) -> None:
    """torchrun's parser also looks at what follows the script, and finds some words ambiguous (--run)."""
    assert main(["train", "--help"]) == 0
    options = re.findall(r"^ +(?:-h, )?(--[\w.-]+)", capsys.readouterr().out, re.MULTILINE)
    assert "--run-dir" in options and "--optim.lr" in options
    for option in options:
        ours = [option, "value"]
        assert get_args_parser().parse_args(["train.py", *ours]).training_script_args == ours


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mthod: rs-sam", "option 'mthod' is not known; did you mean --method?"),
        ("optim:\n  lrr: 1", "option 'optim.lrr' is not known; did you mean --optim.lr?"),
        ("a: [1", "not a readable YAML file"),
        ("just words", "expected options as `name: value`, found 'just words'"),
    ],
)
def test_a_wrong_config_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UsageError) as caught:
        parse("train", "train", commands.train, ["--config", str(tmp_path / "run.yaml")])
    assert str(caught.value).startswith(f"--config {tmp_path / 'run.yaml'}: {message}")


def test_run_is_short_for_run_dir() -> None:
    assert parse("train", "train", commands.train, ["--run", "runs/x"]).run_dir == "runs/x"


def test_dictionaries_and_positional_words() -> None:
    words = ["a.tif", "b.tif", "--model", "m", "--output", "o", "--scale", "auto", "--tile", "128"]
    config = parse("predict", "predict", commands.predict, words)
    assert isinstance(config, PredictConfig)
    assert config.scenes == ["a.tif", "b.tif"] and config.scale == "auto" and config.tile == 128
    words = ["--model", "m", "--data-args.classes", "c.yaml", "--data-args.test", "tile6"]
    evaluation = parse("evaluate", "evaluate", commands.evaluate, words)
    assert isinstance(evaluation, EvaluateConfig)
    assert evaluation.data_args == {"classes": "c.yaml", "test": "tile6"}
    assert parse("models", "models", commands.models, []).pattern == "*"


def test_options_come_from_a_file_and_the_command_line_wins(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("batch_size: 2\nsteps: 7\noptim:\n  lr: 0.01\n")
    words = ["--config", str(tmp_path / "run.yaml"), "--steps", "9"]
    config = parse("train", "train", commands.train, words)
    assert (config.batch_size, config.steps, config.optim.lr) == (2, 9, 0.01)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trian", "command 'trian' is not known; did you mean train?"),
        ("fly", "command 'fly' is not known; choose from train, evaluate"),
        ("train --batchsize 3", "option --batchsize is not known; did you mean --batch-size?"),
        ("train --optim.lrr 3", "option --optim.lrr is not known; did you mean --optim.lr?"),
        ("train --steps many", "--steps: expected a whole number, found many"),
        ("train --image-size", "--image-size: expected one argument"),
        ("train --dtype fp8", "--dtype: expected fp32 or bf16, found fp8"),
        ("train --config nowhere.yaml", "nowhere.yaml"),
        ("train --method rs-sma", "did you mean rs-sam?"),
        ("train --data wdhld --root x", "did you mean whdld?"),
        ("train --model vit_xxl", "vit_xxl"),
        ("predict a.tif --output b.tif", "the following arguments are required: model"),
        ("predict --model m --output b.tif", "the following arguments are required: scenes"),
        ("predict a.tif --model nowhere --output b.tif", "nowhere/model.json: no such file"),
        ("evaluate --model nowhere", "nowhere/model.json: no such file"),
        ("check-data", "the following arguments are required: data"),
        ("check-data whdl --root x", "whdl"),
        ("check-data whdld --root nowhere", "--root nowhere: no such folder"),
        ("models nothing*", "no model matches 'nothing*'; there are "),
    ],
)
def test_bad_usage_is_one_line_and_2(words: str, message: str, error_line: Any) -> None:
    assert main(words.split()) == 2
    assert message in error_line()


def test_a_bad_config_file_is_one_line(tmp_path: Path, error_line: Any) -> None:
    for text, message in (
        ("stepz: 3\n", "stepz"),
        ("steps: [\n", "config"),
        ("steps: x\n", "--steps: expected"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        assert main(["train", "--config", str(tmp_path / "bad.yaml")]) == 2
        assert message in error_line()


# ----------------------------------------------------------------------------------------------- exit codes


def test_predict_exits_0_2_or_3(
    best: Path, tmp_path: Path, capsys: pytest.CaptureFixture, error_line: Any, write_raster: Any
) -> None:
    pixels = np.random.default_rng(0).integers(1, 255, (3, 64, 64)).astype(np.uint8)
    good = str(write_raster(tmp_path / "good.tif", pixels))
    maps = str(tmp_path / "maps")
    options = ["--model", str(best), "--overlap", "0"]
    assert main(["predict", good, *options, "--output", str(tmp_path / "map.tif")]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["predict", good, "nowhere.tif", *options, "--output", maps]) == 3
    assert error_line() == "nowhere.tif: no such file"
    assert (tmp_path / "maps" / "good.tif").is_file()
    assert main(["predict", "nowhere.tif", *options, "--output", str(tmp_path / "x.tif")]) == 2
    assert error_line() == "nowhere.tif: no such file"


def test_warnings_are_one_line_each(
    best: Path, tmp_path: Path, capsys: pytest.CaptureFixture, write_raster: Any
) -> None:
    scene = write_raster(tmp_path / "empty.tif", np.zeros((3, 9, 9), np.uint8), nodata=0)
    assert main(["predict", str(scene), "--model", str(best), "--output", str(tmp_path / "map.tif")]) == 0
    err = capsys.readouterr().err
    assert err.startswith("rsmodels: warning: ") and "every pixel is nodata" in err and err.count("\n") == 1


def test_evaluate_prints_the_table_and_where_the_report_is(best: Path, capsys: pytest.CaptureFixture) -> None:
    words = f"evaluate --model {best} --data-args.length 2 --data-args.size 64 --tiles 0 --device cpu"
    assert main(words.split()) == 0
    out = capsys.readouterr().out
    assert "building" in out and "mean IoU" in out
    assert str(best.parent / "report" / "index.html") in out


def test_check_data_exits_1_where_it_finds_errors(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["check-data", "whdld", "--root", str(tmp_path)]) == 1
    assert "error" in capsys.readouterr().out


def test_models_lists_sizes(capsys: pytest.CaptureFixture) -> None:
    assert main(["models", "*_tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["model", *rsmodels.list_models("*_tiny")]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "rsmodels: interrupted\n"),
        (SystemExit(2), 2, ""),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/x/best"),
            2,
            "error: runs/x/best: no space left",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "out.tif"),
            2,
            "error: out.tif: Permission denied\n",
        ),
        (ValueError("two\nlines"), 2, "error: two lines\n"),
        (torch.OutOfMemoryError("CUDA ..."), 2, "error: out of memory; try a smaller --batch-size"),
        (RuntimeError("a defect"), 2, "Traceback"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_what_a_command_raises(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    def fail(_pattern: str = "*") -> list[str]:
        raise error

    monkeypatch.setattr(commands, "list_models", fail)
    assert main(["models"]) == code
    err = capsys.readouterr().err
    assert message in err
    assert ("Traceback" in err) == (message == "Traceback")


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture) -> None:
    assert main(["models", "nothing", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("rsmodels: error: no model matches")


def test_under_torchrun_the_first_rank_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "--stepz", "3"]) == 2
    assert capsys.readouterr().err == ""


def test_usage_errors_are_value_errors() -> None:
    with pytest.raises(UsageError):
        parse("train", "train", commands.train, ["--nope"])
    assert issubclass(UsageError, ValueError)


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    """`rsmodels models | head -1`, with a reader that is gone before the first line."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    result = subprocess.run(
        [sys.executable, "-u", "-m", "rsmodels", "models", "*_tiny"],
        cwd=ROOT,
        stdout=write_end,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write_end)
    assert (result.returncode, result.stderr) == (0, "")
