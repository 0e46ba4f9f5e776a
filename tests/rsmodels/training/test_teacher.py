"""Training with a teacher beside the model: what it is asked, what it may not change, and its cache."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rsmodels
from rsmodels.data import SyntheticEarth
from rsmodels.registry import METHODS
from rsmodels.training.checkpoint import newest_first
from rsmodels.training.config import LoaderConfig, OptimConfig, TrainConfig
from rsmodels.training.parallel import Ranks
from rsmodels.training.trainer import Trainer, train

ALONE = Ranks(0, 1, torch.device("cpu"))
MakeConfig = Callable[..., TrainConfig]


@pytest.fixture
def save_teacher(tiny_teacher: Any) -> Callable[[Path, int], str]:
    """Writes the weights of a teacher to a file, whose name is returned."""

    def save(path: Path, seed: int) -> str:
        torch.save(tiny_teacher(seed).encoder.state_dict(), path)
        return str(path)

    return save


# ---------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_trains_and_validates(make_config: MakeConfig, method: str, log_of: Any) -> None:
    run = train(make_config(method=method, steps=1))
    terms = {name for name in log_of(run)[0] if name.startswith("loss_")}
    assert len(terms) >= 2 and ({"loss_kl", "loss_mse"} <= terms) == (method == "ktda")
    assert len(log_of(run, "validation")) == 1


def test_the_teacher_is_asked_once_per_batch_and_for_validation(ktda: MakeConfig, asked: list[int]) -> None:
    config = ktda(steps=2, accumulate=2)
    trainer = Trainer(config, ALONE)
    trainer.run()
    trainer.log.close()
    assert asked[:4] == [2] * 4 and sum(asked[4:]) == len(trainer.val_set)


def test_the_teacher_never_changes_and_leaves_no_trace(ktda: MakeConfig, log_of: Any) -> None:
    """And the student comes closer to it."""
    four = {"size": 32, "length": 4}  # the same batch again and again
    trainer = Trainer(ktda(steps=20, checkpoint_every=20, log_every=19, lr=3e-3, data_args=four), ALONE)
    assert trainer.teacher is not None
    inside, before = trainer.teacher.network, trainer.teacher.record["sha256"]
    trainer.run()
    trainer.log.close()
    assert inside.sha256() == before and not inside.training
    assert all(parameter.grad is None for parameter in inside.parameters())
    first, *_, last = (line["loss_mse"] for line in log_of(trainer.folder))
    assert last < first, (first, last)
    optimised = {id(parameter) for parameter in trainer.parameters}
    assert not optimised & {id(parameter) for parameter in inside.parameters()}
    assert len(trainer.optimizer.state) == len(optimised)

    newest = newest_first(trainer.folder / "checkpoints")[0]
    kept = torch.distributed.checkpoint.FileSystemReader(newest).read_metadata().state_dict_metadata
    trained = {name for name, _ in trainer.model.named_parameters()}
    assert {name.partition(".")[2] for name in kept if name.startswith("exp_avg.")} == trained
    own = trainer.model.state_dict().keys()
    assert {name.removeprefix("model.") for name in kept if name.startswith("model.")} == own
    model, info = rsmodels.load_model(trainer.folder / "best")
    assert model.state_dict().keys() == own
    assert info["training"]["teacher"]["sha256"] == before
    assert json.loads((newest / "state.json").read_text())["identity"]["teacher"]["name"] == "dinov2_vit_tiny"


def test_two_runs_see_one_teacher_and_another_seed_another(ktda: MakeConfig) -> None:
    records = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        trainer = Trainer(ktda(folder=folder, seed=seed), ALONE)
        trainer.log.close()
        assert trainer.teacher is not None
        records.append(trainer.teacher.record)
    assert records[0] == records[1] and records[0]["sha256"] != records[2]["sha256"]


def test_without_transfer_there_is_no_teacher(
    ktda: MakeConfig, asked: list[int], capsys: pytest.CaptureFixture[str], log_of: Any
) -> None:
    run = train(ktda(steps=1, model_args={"transfer": False}))
    assert not asked and "loss_kl" not in log_of(run)[0]
    assert "ktda_tiny with these arguments learns from no teacher" in capsys.readouterr().err


def test_random_weights_are_said(ktda: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    Trainer(ktda(), ALONE).log.close()
    said = capsys.readouterr().err
    assert "learning from dinov2_vit_tiny" in said and "which are random" in said


@pytest.mark.parametrize(
    "options, said",
    [
        ({"method": "dinov2-upernet"}, "dinov2_upernet_tiny: 0.8 M of its parameters are random and stay so"),
        ({"model_args": {"freeze_encoder": True}}, "rs_sam_tiny: 0."),
        ({}, ""),
        ({"method": "ktda"}, ""),
    ],
)
def test_random_weights_that_are_frozen_are_said(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str], options: dict[str, Any], said: str
) -> None:
    Trainer(make_config(**options), ALONE).log.close()
    lines = [line for line in capsys.readouterr().err.splitlines() if "random and stay so" in line]
    assert len(lines) == bool(said)
    assert all(line.startswith(said) and "--pretrained" in line for line in lines)


def test_frozen_weights_of_a_file_need_no_word(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], save_teacher: Any
) -> None:
    """Nor do they in the run that goes on, which reads no such file."""
    weights = save_teacher(tmp_path / "dinov2.pth", 1)
    options: dict[str, Any] = {"method": "dinov2-upernet", "pretrained": weights}
    train(make_config(steps=1, **options))
    train(make_config(steps=2, resume="auto", **options))
    assert "random" not in capsys.readouterr().err


def test_the_decay_spares_norms_and_the_warm_up_is_the_papers(ktda: MakeConfig) -> None:
    config = ktda(steps=20)
    config.optim = OptimConfig(warmup=10)
    config.loader = LoaderConfig(cache=True)
    trainer = Trainer(config, ALONE)
    decayed, plain = trainer.optimizer.param_groups
    trainer.log.close()
    assert decayed["weight_decay"] == 0.01 and plain["weight_decay"] == 0.0
    norms = {
        id(parameter)
        for module in trainer.model.modules()
        if isinstance(module, torch.nn.BatchNorm2d) or "Norm" in type(module).__name__
        for parameter in module.parameters(recurse=False)
    }
    assert norms and norms <= {id(parameter) for parameter in plain["params"]}
    assert trainer.learning_rate(0) == pytest.approx(1e-3 * 1e-3)
    assert trainer.learning_rate(9) == pytest.approx(1e-3)


def test_bf16_trains_close_to_fp32(ktda: MakeConfig, losses: Any) -> None:
    exact, rounded = (losses(train(ktda(folder=dtype, dtype=dtype, steps=1))) for dtype in ("fp32", "bf16"))
    assert rounded == pytest.approx(exact, rel=2e-2) and rounded != exact


# --------------------------------------------------------------------------------------------- resuming


def test_resume_ends_with_the_same_bits(
    ktda: MakeConfig, tmp_path: Path, losses: Any, save_teacher: Any, weights_of: Any
) -> None:
    """Batch norms included."""
    weights = save_teacher(tmp_path / "teacher.pth", 0)
    run = train(ktda(steps=4, checkpoint_every=3, teacher_weights=weights))
    first, expected = weights_of(run), losses(run)
    (run / "checkpoints" / "step-4" / "state.json").unlink()
    shutil.rmtree(run / "best")
    train(ktda(steps=4, resume="auto", teacher_weights=weights))
    second = weights_of(run)
    assert any("running_var" in name for name in first)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert losses(run) == expected


def test_another_teacher_is_no_reason_to_go_on(
    ktda: MakeConfig, tmp_path: Path, losses: Any, save_teacher: Any
) -> None:
    one, two = (save_teacher(tmp_path / f"{seed}.pth", seed) for seed in (1, 2))
    train(ktda(steps=1, teacher_weights=one))
    for other in ({"teacher_weights": two}, {"teacher_weights": one, "teacher_fit": "resize"}):
        with pytest.raises(
            ValueError, match=r"step-1: learned from another teacher, dinov2_vit_tiny"
        ) as error:
            train(ktda(steps=2, resume="auto", **other))
        assert "\n" not in str(error.value)
        changed = "--teacher-fit" if "teacher_fit" in other else "--teacher-weights"
        assert f"resume with the {changed} it was started with" in str(error.value)
    # The same weights from another file are the same teacher.
    moved = str((tmp_path / "1.pth").rename(tmp_path / "moved.pth"))
    assert len(losses(train(ktda(steps=2, resume="auto", teacher_weights=moved)))) == 2


def test_another_seed_is_another_random_teacher(ktda: MakeConfig) -> None:
    train(ktda(steps=1))
    with pytest.raises(ValueError, match=r"learned from another teacher, .*resume with the --seed it was"):
        train(ktda(steps=2, resume="auto", seed=1))


# -------------------------------------------------------------------------------------------- bad input


def test_a_later_tile_that_would_be_cropped_ends_the_run(
    ktda: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = SyntheticEarth.__getitem__

    def reading(self: SyntheticEarth, index: int) -> dict[str, Any]:
        sample = read(self, index)
        if index:
            sample.update(image=sample["image"].repeat(1, 1, 2), mask=sample["mask"].repeat(1, 2))
        return sample

    monkeypatch.setattr(SyntheticEarth, "__getitem__", reading)
    with pytest.raises(ValueError, match="tiles of 32x64 pixels are cropped to 32x32"):
        train(ktda(steps=1, teacher_cache=str(tmp_path / "maps")))


@pytest.mark.parametrize(
    "options, expected",
    [
        (
            {"teacher_weights": "/nowhere/dinov2.pth"},
            "--teacher-weights /nowhere/dinov2.pth: no such file; give a checkpoint (.safetensors, .pth, "
            ".pt, .bin) or a hub id, OWNER/NAME or OWNER/NAME/FILE",
        ),
        (
            {"teacher": "dinov2_vit_s"},
            "--teacher dinov2_vit_s: its maps have 384 channels, ktda_tiny learns from 128",
        ),
        ({"teacher_args": {"patch_size": 16}}, "its maps are 2x2, ktda_tiny aligns its own to 3x3"),
        ({"teacher_args": {"depth": 2}}, "dinov2_vit_tiny has no option 'depth'"),
        ({"teacher_fit": "crop"}, "fit='crop'"),
        (
            {"teacher_cache": "maps", "data_args": {"size": 64, "length": 4}},
            "--teacher-cache maps: tiles of 64x64",
        ),
        ({"batch_size": 2, "accumulate": 2}, "--batch-size 2 leaves one tile for each rank and pass"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_run(
    ktda: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        train(ktda(**options))
    assert expected in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_the_cache_is_a_folder(ktda: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "maps").write_text("")
    with pytest.raises(ValueError, match=r"--teacher-cache .*maps: is a file; give a folder"):
        train(ktda(teacher_cache=str(tmp_path / "maps")))


def test_one_tile_per_pass_is_enough_without_batch_norms(make_config: MakeConfig) -> None:
    Trainer(make_config(batch_size=1), ALONE).log.close()
