"""One process, in this process: what a run writes, how it ends, and what it computes."""

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import rsmodels
from rsmodels.data import IGNORE, SyntheticEarth
from rsmodels.methods.rs_sam import RSSAM
from rsmodels.training import trainer as trainer_module
from rsmodels.training.checkpoint import Checkpoints, newest_first
from rsmodels.training.config import LoaderConfig, TrainConfig
from rsmodels.training.parallel import Ranks
from rsmodels.training.trainer import NonFiniteLossError, Trainer, train

ALONE = Ranks(0, 1, torch.device("cpu"))
MakeConfig = Callable[..., TrainConfig]


def cross_entropy_per_pixel(self: RSSAM, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """A loss that is a plain mean over pixels: the mean over passes is then the mean over the batch."""
    logits = self(batch["image"])
    return {"ce": torch.nn.functional.cross_entropy(logits, batch["mask"])}, logits


def test_a_run_folder_has_all_that_the_design_lists(make_config: MakeConfig, log_of: Any) -> None:
    config = make_config(
        report=True, steps=3, validate_every=2, checkpoint_every=2, bands=(3, 1, 2), loader=LoaderConfig()
    )
    run = train(config)
    train_lines, validations = log_of(run), log_of(run, "validation")
    assert [line["step"] for line in train_lines] == [1, 2, 3]
    assert [line["step"] for line in validations] == [2, 3]
    numbers = {"loss", "loss_ce", "loss_dice", "lr", "grad_norm", "images_per_second", "memory_gib"}
    assert numbers <= train_lines[0].keys()
    assert train_lines[0]["loss"] == pytest.approx(train_lines[0]["loss_ce"] + train_lines[0]["loss_dice"])
    assert [path.name for path in newest_first(run / "checkpoints")] == ["step-3", "step-2"]
    assert (run / "config.yaml").is_file() and (run / "report" / "metrics.json").is_file()

    model, info = rsmodels.load_model(run / "best")
    schema = SyntheticEarth(size=32).schema
    assert info["classes"] == list(schema.classes) and info["palette"] == [list(c) for c in schema.palette]
    assert (info["binary"], info["ignore_index"], info["bands"]) == (False, IGNORE, [3, 1, 2])
    assert info["image_size"] == [32, 32] and info["base_weights"] is None
    assert info["library_version"] == rsmodels.__version__
    best = min(validations, key=lambda line: line["loss"])
    assert info["training"]["validation_loss"] == pytest.approx(best["loss"])
    assert info["training"]["step"] == best["step"]
    assert "products" in info["training"]["kernels"]["tuning"]
    assert model.preprocessing.bands == (3, 1, 2)


def test_loss_falls_in_thirty_steps(make_config: MakeConfig, log_of: Any) -> None:
    run = train(make_config(steps=30, log_every=5, lr=3e-3))
    losses = [line["loss"] for line in log_of(run)]
    assert losses[-1] < 0.9 * losses[0]


def test_accumulation_equals_the_large_batch(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, log_of: Any
) -> None:
    monkeypatch.setattr(RSSAM, "losses_and_logits", cross_entropy_per_pixel)
    # Not more steps: Adam's first ones take the sign of gradients that are mostly rounding.
    runs = [train(make_config(folder=f"run{n}", accumulate=n, steps=2)) for n in (1, 4)]
    once, parts = (log_of(run) for run in runs)
    for a, b in zip(once, parts, strict=True):
        assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), rel=1e-4)


def test_clipping_bounds_the_gradient_and_logs_the_norm_before(make_config: MakeConfig, log_of: Any) -> None:
    seen: dict[float, Tensor] = {}
    for clip in (0.0, 1e-3):
        trainer = Trainer(make_config(folder=f"clip{clip}", clip=clip, steps=1), ALONE)
        step = trainer.optimizer.step
        norms: list[Tensor] = []

        def noted(trainer: Trainer = trainer, norms: list[Tensor] = norms, step: Any = step) -> None:
            norms.append(
                torch.stack([p.grad.norm() for p in trainer.parameters if p.grad is not None]).norm()
            )
            step()

        trainer.optimizer.step = noted  # type: ignore[method-assign]
        trainer.run()
        trainer.log.close()
        seen[clip] = norms[0]
        assert log_of(trainer.folder)[0]["grad_norm"] == pytest.approx(seen[0.0].item(), rel=1e-4)
    assert seen[1e-3].item() == pytest.approx(1e-3, rel=1e-3)
    assert seen[0.0].item() > 1e-2


def test_norms_and_biases_do_not_decay(make_config: MakeConfig) -> None:
    trainer = Trainer(make_config(), ALONE)
    decayed, plain = trainer.optimizer.param_groups
    assert decayed["weight_decay"] == 0.1 and all(p.ndim >= 2 for p in decayed["params"])
    assert plain["weight_decay"] == 0.0 and all(p.ndim < 2 for p in plain["params"])
    trainable = sum(p.requires_grad for p in trainer.model.parameters())
    assert len(decayed["params"]) + len(plain["params"]) == trainable
    trainer.log.close()


def test_activation_checkpointing_changes_no_number(make_config: MakeConfig, log_of: Any) -> None:
    runs = [
        train(make_config(folder=f"run{on}", activation_checkpointing=on, steps=2)) for on in (False, True)
    ]
    assert [line["loss"] for line in log_of(runs[0])] == [line["loss"] for line in log_of(runs[1])]


def test_bf16_trains_close_to_fp32(make_config: MakeConfig, log_of: Any) -> None:
    runs = [train(make_config(folder=dtype, dtype=dtype, steps=2)) for dtype in ("fp32", "bf16")]
    for a, b in zip(*map(log_of, runs), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-2)
        assert a["loss"] != b["loss"]


def test_validation_loss_and_metrics_ignore_how_the_split_is_batched(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, log_of: Any
) -> None:
    monkeypatch.setattr(RSSAM, "losses_and_logits", cross_entropy_per_pixel)
    trainers = [Trainer(make_config(folder=f"run{n}", accumulate=n), ALONE) for n in (1, 4)]
    for trainer in trainers:
        trainer._validate(1)
        trainer.log.close()
    first, second = (log_of(trainer.folder, "validation")[0] for trainer in trainers)
    assert first.pop("kind") == second.pop("kind") and first == pytest.approx(second, rel=1e-5)


def test_only_training_counts_in_images_per_second(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, log_of: Any
) -> None:
    clock = [0.0]

    def tick() -> float:
        clock[0] += 1
        return clock[0]

    def slow(work: Callable[..., Any]) -> Callable[..., Any]:
        def working(*args: Any) -> Any:
            clock[0] += 1000
            return work(*args)

        return working

    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(perf_counter=tick))
    monkeypatch.setattr(Checkpoints, "save", slow(Checkpoints.save))
    monkeypatch.setattr(Trainer, "_validate", slow(Trainer._validate))
    run = train(make_config(steps=4, checkpoint_every=1, validate_every=2))
    assert [line["images_per_second"] for line in log_of(run)] == [4.0] * 4


def test_dataset_statistics_go_into_the_model(make_config: MakeConfig) -> None:
    run = train(make_config(steps=1, loader=LoaderConfig(normalize="dataset")))
    images = torch.stack([SyntheticEarth(size=32, length=10)[i]["image"] for i in range(10)])
    model, _ = rsmodels.load_model(run / "best")
    assert model.preprocessing.mean == pytest.approx(images.mean((0, 2, 3)).tolist(), rel=1e-4)
    assert model.preprocessing.std == pytest.approx(images.std((0, 2, 3)).tolist(), rel=1e-3)


# -------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "options, expected",
    [
        (
            {"batch_size": 6, "accumulate": 4},
            "--batch-size 6 does not split over 1 rank(s) and --accumulate 4",
        ),
        ({"parallel": "fsdp"}, "--parallel fsdp needs several processes"),
        ({"bands": (1, 2)}, "gives 2 bands and rs_sam_tiny takes 3"),
        ({"model_args": {"mfff": False}}, "mfff"),
        ({"data_args": {"sizes": 3}}, "sizes"),
        ({"data": "whdld", "root": "/nowhere", "data_args": {}}, "/nowhere"),
        ({"pretrained": "/nowhere/sam.pth"}, "/nowhere/sam.pth"),
        ({"image_size": 40}, "40"),
        ({"resume": "/nowhere/run"}, "--resume /nowhere/run"),
        ({"steps": 9, "lr": 0.1, "dtype": "fp16"}, "fp16"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_run(
    make_config: MakeConfig, tmp_path: Path, options: dict[str, Any], expected: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        train(make_config(**options))
    assert expected in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_run_is_not_overwritten(
    make_config: MakeConfig, weights_of: Any, same_weights: Any
) -> None:
    run = train(make_config(steps=1))
    before = weights_of(run)
    with pytest.raises(ValueError, match=r"already holds a run .*step-1.*--resume auto"):
        train(make_config(steps=1, seed=1))
    assert same_weights(weights_of(run), before)


def test_a_loss_that_is_not_finite_names_step_tiles_and_checkpoint(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, weights_of: Any, same_weights: Any
) -> None:
    read, poisoned = SyntheticEarth.__getitem__, "synthetic-train-0-000007"

    def reading(self: SyntheticEarth, index: int) -> dict[str, Any]:
        sample = read(self, index)
        if sample["name"] == poisoned and self.split == "train":
            sample["image"][0, 3, 4] = math.nan
        return sample

    clean = train(make_config(folder="clean", steps=3, checkpoint_every=1))
    monkeypatch.setattr(SyntheticEarth, "__getitem__", reading)
    config = make_config(steps=3, checkpoint_every=1)
    with pytest.raises(NonFiniteLossError) as error:
        train(config)
    text = str(error.value)
    run = Path(str(config.run_dir))
    assert text.startswith("step ") and poisoned in text and "the loss is nan" in text and "\n" not in text
    bad = int(text.split()[1].rstrip(":"))
    assert len(text.split("tiles: ")[1].split("; ")[0].split(", ")) == 4
    newest = newest_first(run / "checkpoints")[0]
    assert newest.name == f"step-{bad - 1}" and str(newest) in text
    # The good checkpoint resumes.
    monkeypatch.setattr(SyntheticEarth, "__getitem__", read)
    assert train(make_config(steps=3, resume="auto")) == run
    assert same_weights(weights_of(run), weights_of(clean))


def test_a_data_set_without_a_test_split_is_reported_on_its_validation_split(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (data / split / kind).mkdir(parents=True)
        for index in range(4):
            pixels = np.random.default_rng(index).integers(0, 255, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(data / split / "images" / f"{index}.png")
            Image.fromarray((pixels[..., 0] > 99).astype(np.uint8)).save(
                data / split / "masks" / f"{index}.png"
            )
    (data / "classes.yaml").write_text(
        'encoding: values\nclasses:\n  - {name: a, color: "102030"}\n  - {name: b, color: "ff0000"}\n'
    )
    run = train(make_config(steps=1, data="folder", root=str(data), data_args={}, model="tiny", report=True))
    assert "the report will look at the validation images" in capsys.readouterr().err
    assert "validation images" in (run / "report" / "index.html").read_text()


def test_two_lengths_are_said_to_be_one(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str], log_of: Any
) -> None:
    run = train(make_config(steps=1, epochs=200.0))
    assert "--steps 1 sets the length; --epochs 200 is not used" in capsys.readouterr().err
    assert len(log_of(run)) == 1


def test_a_signal_finishes_the_step_and_writes_a_checkpoint(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    look = Trainer._look

    def interrupting(self: Trainer, done: int) -> None:
        if done == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        look(self, done)

    monkeypatch.setattr(Trainer, "_look", interrupting)
    config = make_config(steps=50)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    newest = newest_first(Path(str(config.run_dir)) / "checkpoints")[0]
    assert newest.name == "step-3"
    assert f"stopped after step 3, {newest} is written; --resume auto" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
