"""Pretraining: runs, their files and options, resuming, who reads the result, and the probe."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import rsmodels
from rsmodels.cli import main
from rsmodels.data.synthetic.gaps import TARGETS, left_out
from rsmodels.files import hold_file
from rsmodels.pretraining import pretrain as pretraining
from rsmodels.pretraining import probe
from rsmodels.pretraining.config import PretrainConfig
from rsmodels.pretraining.pretrain import build_encoder, pretrain
from rsmodels.pretraining.scenes import Views, places
from rsmodels.registry import ENCODERS
from rsmodels.weights import read_state

SIZES = {"dinov2_vit_tiny": 56, "sam_vit_tiny": 64}


def small(output: Path, **options: Any) -> PretrainConfig:
    defaults: dict[str, Any] = {
        "model": "dinov2_vit_tiny",
        "steps": 5,
        "batch_size": 4,
        "num_workers": 0,
        "device": "cpu",
        "log_every": 1,
        "probe": False,
    }
    options = {**defaults, **options}
    return PretrainConfig(str(output), image_size=SIZES[options["model"]], **options)


@pytest.mark.parametrize("model", SIZES)
def test_filling_in_gets_better(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain(
        small(tmp_path / "x.safetensors", model=model, objective="mim", steps=24, batch_size=8, log_every=6)
    )
    lines = [line for line in capsys.readouterr().err.splitlines() if "loss" in line]
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines]
    assert len(losses) == 4 and losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("model", SIZES)
def test_unit_scale_changes_the_scale_alone(model: str) -> None:
    size = SIZES[model]
    encoder = build_encoder(PretrainConfig("x", model=model, image_size=size)).eval().double()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)  # no bias or scale stays at its start
        images = torch.randn(3, 3, size, size).double() * 0.3
        before = encoder.forward_intermediates(images, range(4))
        pretraining.to_unit_scale(encoder, images)
        after = encoder.forward_intermediates(images, range(4))
    assert torch.cat(after).square().mean().item() == pytest.approx(1, rel=1e-4)
    factor = after[0].norm() / before[0].norm()
    assert not 0.8 < factor < 1.2
    for small, large in zip(after, before, strict=True):
        assert (small - large * factor).norm() < 0.01 * small.norm()  # norms have an epsilon


# --------------------------------------------------------------------------------------- runs and their files


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Ctrl-C while step number `steps` runs."""
    step = pretraining.Run.step

    def stopped(self: pretraining.Run, number: int, views: Views) -> Tensor:
        if number == steps - 1:
            signal.raise_signal(signal.SIGINT)
        return step(self, number, views)

    monkeypatch.setattr(pretraining.Run, "step", stopped)


@pytest.mark.parametrize("objective", ["contrast", "mim", "distill"])
def test_a_stopped_run_ends_with_the_same_bits(
    objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(small(tmp_path / "whole.safetensors", objective=objective))
    output = tmp_path / "stopped.safetensors"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 3)
        pretrain(small(output, objective=objective, resume="auto"))
    state = tmp_path / "stopped.resume.safetensors"
    assert state.is_file() and not output.exists()
    assert "stopped after step 3 of 5" in capsys.readouterr().err
    assert pretrain(small(output, objective=objective, resume="auto")).steps == 5
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == [
        "stopped.safetensors",
        "whole.safetensors",
    ]
    whole, resumed = read_state(tmp_path / "whole.safetensors"), read_state(output)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    # And what is done is done.
    assert pretrain(small(output, objective=objective, resume="auto")).steps == 0
    for other, found in (({"seed": 9}, "seed 0, this run has 9"), ({"steps": 7}, "steps 5, this run has 7")):
        with pytest.raises(ValueError, match=f"stopped.safetensors: it was written with {found}"):
            pretrain(small(output, objective=objective, resume="auto", **other))


def test_a_file_of_something_else_is_not_a_finished_run(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors: no pretraining wrote this file"):
        pretrain(small(tmp_path / "other.safetensors", resume="auto"))


def test_another_seed_is_another_encoder(tmp_path: Path) -> None:
    states = []
    for seed in (0, 1):
        pretrain(small(tmp_path / f"{seed}.safetensors", seed=seed, steps=1))
        states.append(read_state(tmp_path / f"{seed}.safetensors"))
    assert not torch.equal(states[0]["pos_embed"], states[1]["pos_embed"])


def test_dinov2_reads_it_without_a_mismatch(tmp_path: Path) -> None:
    output = tmp_path / "dinov2.safetensors"
    pretrain(small(output, steps=2))
    encoder: Any = ENCODERS["dinov2_vit_tiny"](image_size=56)
    report = encoder.load_pretrained(str(output))
    assert not report.initialised and not report.dropped and not report.resized
    state = read_state(output)
    assert all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items())
    larger = rsmodels.create_backbone(
        "dinov2_vit_tiny", out_indices=(0, 3), image_size=140, pretrained=str(output)
    )
    assert torch.equal(larger.encoder.blocks[3].ls2.gamma, state["blocks.3.ls2.gamma"])


def test_rs_sam_reads_it_without_a_mismatch(tmp_path: Path) -> None:
    output = tmp_path / "sam.safetensors"
    pretrain(small(output, model="sam_vit_tiny", steps=2))
    state = read_state(output)
    model = rsmodels.create_model("rs_sam_tiny", num_classes=2, image_size=64, pretrained=str(output))
    own = model.encoder.state_dict()
    for key, value in state.items():
        # LoRA keeps a frozen weight under the same name.
        assert torch.equal(own[key], value), key
    assert {key for key in own if key not in state} == {key for key in own if ".lora_" in key}
    assert len(model.base_weights) == 64
    backbone: Any = ENCODERS["sam_vit_tiny"](image_size=128)
    report = backbone.load_pretrained(str(output))
    assert not report.dropped and all(key.startswith("neck.") for key in report.initialised)


def test_the_command_pretrains_probes_and_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pretraining, "linear_probe", lambda encoder: probe.linear_probe(encoder, tiles=2))
    monkeypatch.setattr(probe, "ITERATIONS", 3)
    words = f"pretrain --output {tmp_path / 'new' / 'x.safetensors'} --minutes 0.003 --image-size 56"
    assert main([*words.split(), "--batch-size", "2", "--num-workers", "0", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    (said,) = [line for line in err.splitlines() if "steps fit into 0.003 minutes; --steps" in line]
    steps = int(said.split("--steps ")[1].split()[0])
    assert f"pretrain: {steps}/{steps}: loss" in err
    rows = [line.split() for line in out.splitlines()]
    assert rows[0][-2:] == ["random", "pretrained"] and rows[-1] == [str(tmp_path / "new" / "x.safetensors")]
    assert [row[0] for row in rows[1:7]] == ["source", *TARGETS] and rows[7][3] == "targets"
    assert all(0 <= float(row[-1]) <= 100 for row in rows[1:8])


def test_ctrl_c_is_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_after(monkeypatch, 1)
    words = (
        f"pretrain --output {tmp_path}/x.safetensors --steps 3 --image-size 56 --batch-size 2 --num-workers 0"
    )
    assert main(words.split()) == 130
    assert (tmp_path / "x.resume.safetensors").is_file()
    assert capsys.readouterr().err.endswith("rsmodels: interrupted\n")
    for more, message in (
        ("", "a run was stopped here"),
        (" --resume auto --lr 1", "it was written with lr 0.002, this run has 1.0; resume with the options"),
        (" --resume auto --objective mim", "it was written with objective contrast, this run has mim"),
        (" --resume auto --steps 4", "it was written with steps 3, this run has 4"),
    ):
        assert main((words + more).split()) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "x.resume.safetensors").write_bytes(b"damaged")
    assert main([*words.split(), "--resume", "auto"]) == 2
    assert "x.resume.safetensors: not readable as weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--output x.pth", "--output x.pth: expected a file name that ends in .safetensors"),
        ("--output there.safetensors", "--output there.safetensors: already exists"),
        ("--model vit_b", "--model 'vit_b': no such encoder; choose one of dinov2_vit_b"),
        ("--steps 0", "--steps must be above 0, not 0"),
        ("--seed -1", "--seed must be 0 or more, not -1"),
        ("--steps 3 --minutes 1", "--steps 3 and --minutes 1 both set the length; give one"),
        (
            "--objective distill --batch-size 1",
            "--batch-size 1: --objective distill compares the crops of a batch",
        ),
        (
            "--image-size 60",
            "rsmodels: error: --image-size 60: expected a positive multiple of 14, in pixels",
        ),
        ("--image-size 28", "--image-size 28: too small to learn from patches of 14 pixels; give at least"),
        ("--leave-out climate=martian", "domain climate='martian' is unknown"),
        ("--leave-out bands=rgb,bands=irrg", "each at most once"),
        ("--data folder", "--data: expected synthetic, found folder"),
        ("--resume here", "--resume: expected auto, found here"),
    ],
)
def test_bad_usage_is_one_line_and_2(
    words: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.safetensors").touch()
    base = [] if "--output" in words else ["--output", "x.safetensors"]
    base += [] if "--steps" in words else ["--steps", "1"]
    assert main(["pretrain", *base, *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("rsmodels: error: ") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "x.safetensors").exists()


def test_nothing_left_to_learn_from() -> None:
    with pytest.raises(ValueError, match="--leave-out leaves no domain to learn from"):
        places(left_out(["bands=rgb", "bands=irrg"]))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining.Run, "step", lambda *_: torch.tensor(math.nan))
    with pytest.raises(ValueError, match="step 1: the loss is nan; no state was written yet; a lower --lr"):
        pretrain(small(tmp_path / "x.safetensors"))
    assert list(tmp_path.glob("[!.]*")) == []


def test_an_output_is_made_by_one_process_at_a_time(tmp_path: Path, another_process_holds: Any) -> None:
    output = tmp_path / "x.safetensors"
    with another_process_holds(hold_file, output) as other:
        for resume in (None, "auto"):
            with pytest.raises(ValueError, match=rf"x.safetensors: process {other} .* another name"):
                pretrain(small(output, steps=1, resume=resume))
        pretrain(small(tmp_path / "y.safetensors", steps=1))  # another file of that folder is free
    pretrain(small(output, steps=1))


# -------------------------------------------------------------------------------------------------- the probe


def test_the_probe_finds_what_is_linear() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (4, 6, 6), generator=generator)
    features = torch.nn.functional.one_hot(labels, 3).float() + 0.1 * torch.randn(
        4, 6, 6, 3, generator=generator
    )
    weight = probe.fit(features, labels, 3)
    assert probe.logits_of(features, weight, (6, 6)).argmax(1).eq(labels).all()
    ignored = torch.full_like(labels, 255)
    ignored[0] = labels[0]  # what is ignored teaches nothing
    assert torch.equal(probe.fit(features, ignored, 3), probe.fit(features[:1], labels[:1], 3))


def test_the_probe_is_repeatable_and_names_every_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "ITERATIONS", 3)
    encoder = build_encoder(PretrainConfig("x", image_size=56)).eval()
    figures = probe.linear_probe(encoder, tiles=3)
    assert list(figures) == ["source", *TARGETS] and all(0 < value < 1 for value in figures.values())
    assert probe.linear_probe(encoder, tiles=3) == figures
    assert probe.mean_of_targets(figures) == pytest.approx(sum(list(figures.values())[1:]) / 5)
