from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any

import pytest

from rsmodels.cli.options import parse
from rsmodels.registry import METHODS
from rsmodels.training.config import (
    LoaderConfig,
    OptimConfig,
    TrainConfig,
    changed_options,
    resolve,
    to_dict,
    write_config,
)


def run(config: TrainConfig) -> int:
    """What the command line's parser is built from."""
    return 0


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"method": "rs-san"}, "--method 'rs-san' is not known; did you mean rs-sam?"),
        ({"model": "vit_x"}, "vit_x"),
        ({"model": "sam_lora_tiny"}, "sam_lora_tiny"),
        ({"data": "whdl", "root": "x"}, "did you mean whdld?"),
        ({"data": "whdld"}, "--data whdld needs --root"),
        ({"steps": 0}, "--steps must be above 0, not 0"),
        ({"epochs": -1.0}, "--epochs must be above 0, not -1.0"),
        ({"batch_size": -8}, "--batch-size must be above 0, not -8"),
        ({"image_size": 0}, "--image-size must be above 0"),
        ({"num_workers": -1}, "--num-workers must be 0 or more"),
        ({"checkpoint_every": 0}, "--checkpoint-every must be above 0"),
        ({"optim": OptimConfig(lr=-1e-3)}, "--optim.lr must be above 0"),
        ({"optim": OptimConfig(lr=float("nan"))}, "--optim.lr must be above 0, not nan"),
        ({"optim": OptimConfig(weight_decay=-0.1)}, "--optim.weight-decay must be 0 or more"),
        (
            {"optim": OptimConfig(warmup_start=1.5)},
            "--optim.warmup-start is a share of --optim.lr, at most 1",
        ),
        ({"optim": OptimConfig(warmup_start=-0.1)}, "--optim.warmup-start must be 0 or more"),
        ({"optim": OptimConfig(horizon=0)}, "--optim.horizon must be above 0, not 0"),
        ({"optim": OptimConfig(betas=(0.9, 1.0))}, "--optim.betas must lie in [0, 1)"),
        ({"bands": (0, 1)}, "--bands count from 1"),
        ({"model_args": {"bands": [3, 2, 1]}}, "--model-args.bands: has its own option, --bands"),
        ({"pretrained": ""}, "--pretrained '': is empty; give a path, or leave it out"),
        ({"method": "ktda", "teacher_weights": ""}, "--teacher-weights '': is empty"),
        ({"method": "ktda", "teacher_cache": ""}, "--teacher-cache '': is empty"),
        ({"device": "gpu"}, "--device 'gpu' is not known"),
        ({"shard_size": 2, "parallel": "fsdp"}, "--shard-size 2 belongs to --parallel hsdp"),
        (
            {"teacher": "dinov2_vit_b"},
            "--teacher dinov2_vit_b: rs_sam_tiny learns from no teacher; leave it out",
        ),
        ({"teacher_cache": "maps"}, "--teacher-cache maps: rs_sam_tiny learns from no teacher"),
        ({"teacher_fit": "resize", "method": "sam-lora"}, "or choose --method ktda"),
        (
            {"method": "ktda", "teacher": "dinov2_vitb"},
            "--teacher 'dinov2_vitb' is not known; did you mean dinov2_vit_b?",
        ),
        ({"method": "ktda", "teacher": "sam_vit_b"}, "choose one of dinov2_vit_b, dinov2_vit_g"),
        ({"method": "ktda", "teacher_args": {"fit": "pad"}}, "--teacher-args.fit: has its own option"),
        (
            {"method": "ktda", "teacher_cache": "maps", "loader": LoaderConfig(flip=True)},
            "--teacher-cache maps: --loader.flip changes tiles at random",
        ),
        (
            {"method": "ktda", "teacher_cache": "maps", "loader": LoaderConfig(scale=(0.5, 2.0))},
            "--teacher-cache maps: --loader.scale changes tiles at random",
        ),
        ({"loader": LoaderConfig(scale=(2.0, 0.5))}, "--loader.scale must be two shares above 0"),
        ({"loader": LoaderConfig(scale=(0.0, 1.0))}, "the smaller first, not [0.0, 1.0]"),
        ({"loader": LoaderConfig(max_class_share=0.0)}, "--loader.max-class-share is a share"),
        ({"loader": LoaderConfig(max_class_share=75.0)}, "at most 1, not 75.0"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError) as error:
        resolve(TrainConfig(**options))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_defaults_train_the_tiny_model_on_synthetic_data() -> None:
    config = resolve(TrainConfig())
    assert (config.model, config.data, config.epochs) == ("rs_sam_tiny", "synthetic", 5.0)
    assert config.run_dir == "runs/synthetic-rs_sam_tiny"


def test_real_data_gets_the_papers_model_and_length() -> None:
    config = resolve(TrainConfig(method="sam-lora", data="whdld", root="/data"))
    assert (config.model, config.epochs) == ("sam_lora_vit_b", 200.0)


@pytest.mark.parametrize(
    "options, model, teacher",
    [
        ({}, "ktda_tiny", "dinov2_vit_tiny"),
        ({"data": "whdld", "root": "/data"}, "ktda_convnext_b", "dinov2_vit_b"),
        ({"model": "convnext_b", "teacher": "dinov2_vit_l"}, "ktda_convnext_b", "dinov2_vit_l"),
    ],
)
def test_a_student_gets_the_teacher_it_is_made_for(options: Any, model: str, teacher: str) -> None:
    config = resolve(TrainConfig(method="ktda", **options))
    assert (config.model, config.teacher) == (model, teacher)
    assert resolve(config) == config, "what is written into config.yaml replays"


def test_what_is_left_open_of_the_optimiser_is_the_methods() -> None:
    def settings(**options: Any) -> tuple[Any, ...]:
        optim = resolve(TrainConfig(**options)).optim
        return optim.lr, optim.weight_decay, optim.power, optim.warmup_start

    assert settings() == settings(method="sam-lora") == (5e-3, 0.1, 0.9, None)
    assert settings(method="ktda") == (1e-3, 0.01, 0.9, 1e-3)
    assert settings(method="rein") == settings(method="crossearth") == (1e-4, 0.05, 0.9, None)
    own = OptimConfig(lr=6e-4, weight_decay=0.0, warmup_start=0.5)
    assert settings(method="ktda", optim=own) == (6e-4, 0.0, 0.9, 0.5)


def test_steps_win_over_epochs(tmp_path: Any) -> None:
    config = resolve(TrainConfig(steps=5, epochs=2.0))
    assert (config.steps, config.epochs) == (5, None)
    (tmp_path / "recipe.yaml").write_text("epochs: 200\n")
    words = ["--config", str(tmp_path / "recipe.yaml"), "--steps", "3"]
    config = resolve(parse("train", "train", run, words))
    assert (config.steps, config.epochs) == (3, None)
    write_config(config, tmp_path / "config.yaml")
    words = ["--config", str(tmp_path / "config.yaml"), "--steps", "null", "--epochs", "2"]
    config = resolve(parse("train", "train", run, words))
    assert (config.steps, config.epochs) == (None, 2.0)


@pytest.mark.parametrize(
    "resume, run_dir",
    [
        ("runs/x", "runs/x"),
        ("runs/x/", "runs/x"),
        ("/runs/x/checkpoints", "/runs/x"),
        ("runs/x/checkpoints/step-6", "runs/x"),
        ("kept/step-6", "runs/synthetic-rs_sam_tiny"),
        ("auto", "runs/synthetic-rs_sam_tiny"),
    ],
)
def test_a_path_to_resume_from_names_the_run_folder(resume: str, run_dir: str) -> None:
    assert resolve(TrainConfig(resume=resume)).run_dir == run_dir
    assert resolve(TrainConfig(resume=resume, run_dir="mine")).run_dir == "mine"


def test_a_written_configuration_replays(tmp_path: Any) -> None:
    config = TrainConfig(
        model_args={"mff": False},
        bands=(3, 2, 1),
        steps=7,
        optim=OptimConfig(lr=0.1, betas=(0.8, 0.9)),
        loader=LoaderConfig(cache=True),
    )
    write_config(config, tmp_path / "config.yaml")
    assert parse("train", "train", run, ["--config", str(tmp_path / "config.yaml")]) == config
    assert parse(
        "train", "train", run, ["--config", str(tmp_path / "config.yaml"), "--optim.lr", "0.2"]
    ) == replace(config, optim=replace(config.optim, lr=0.2))


def test_a_resumed_run_is_repeated_and_not_resumed(tmp_path: Any) -> None:
    config = TrainConfig(resume="runs/a", steps=7)
    write_config(config, tmp_path / "config.yaml")
    again = parse("train", "train", run, ["--config", str(tmp_path / "config.yaml")])
    assert again == replace(config, resume=None)


def test_every_option_has_a_help_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("train", "train", run, ["--help"])
    text = " ".join(capsys.readouterr().out.split())

    def options(kind: type, prefix: str = "--") -> list[str]:
        names = []
        for field in fields(kind):
            value = field.default_factory() if callable(field.default_factory) else field.default
            nested = options(type(value), f"{prefix}{field.name}.") if is_dataclass(value) else []
            names += nested or [f"{prefix}{field.name}"]
        return names

    for option in options(TrainConfig):
        spelled = option.replace("_", "-")
        assert f"{spelled} " in text, spelled
        # The help line reads "--steps STEPS Optimiser steps (…)": words follow option and placeholder.
        after = text.split(f" {spelled} ")[-1]
        assert after.split("(type:")[0].count(" ") >= 3, f"{spelled} has no help text"


def test_changed_options_names_nested_ones() -> None:
    before = to_dict(TrainConfig(steps=5))
    after = to_dict(TrainConfig(steps=9, optim=OptimConfig(lr=0.1)))
    assert changed_options(before, after) == {"optim.lr": (None, 0.1), "steps": (5, 9)}
    assert asdict(TrainConfig()).keys() == before.keys()


def test_the_help_names_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("train", "train", run, ["--help"])
    said = "".join(capsys.readouterr().out.split())  # lines break at hyphens, too
    assert f"ofitsbaseline:{','.join(sorted(METHODS))}" in said


def test_options_inside_of_options_are_kept_together() -> None:
    words = "--model-args.student_options.dims [8,16] --model-args.fmm_depth 0"
    more = "--model-args.student_options.a.b=1e-3 --model-args.student_options.in-chans 4"
    config = parse("train", "train", run, f"{words} {more}".split())
    assert config.model_args == {
        "fmm_depth": 0,
        "student_options": {"dims": [8, 16], "a": {"b": 0.001}, "in_chans": 4},
    }
    with pytest.raises(ValueError, match=r"option --model-args.a.b: '\[1' is no value"):
        parse("train", "train", run, ["--model-args.a.b", "[1"])


def test_options_inside_of_options_join_those_of_a_file(tmp_path: Any) -> None:
    def given(*texts: str) -> dict[str, Any]:
        words = []
        for index, text in enumerate(texts):
            (tmp_path / f"{index}.yaml").write_text(text)
            words += ["--config", str(tmp_path / f"{index}.yaml")]
        words += ["--model-args.student_options.drop", "0.1", "--model-args.student_options.a.b", "1"]
        return parse("train", "train", run, words).model_args

    new = {"drop": 0.1, "a": {"b": 1}}
    first = "model_args: {mff: false, student_options: {depths: [1, 1], drop: 0.5, a: {c: 2}}}"
    joined = {"depths": [1, 1], "drop": 0.1, "a": {"c": 2, "b": 1}}
    assert given(first) == given(first, "steps: 3") == {"mff": False, "student_options": joined}
    assert given(first, "model_args: {student_options: {x: 1}}") == {"student_options": {"x": 1, **new}}
    for nothing in ("model_args: null", "model_args: {student_options: null}", "steps: 3"):
        assert given(nothing) == {"student_options": new}
