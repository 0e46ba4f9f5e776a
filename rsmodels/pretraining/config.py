"""What a pretraining can be told: one dataclass, whose fields are the command line."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal

from rsmodels.files import check_output
from rsmodels.registry import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, list_encoders

# As SAM and DINOv2 and the methods on top of them normalise.
PREPROCESSING = Preprocessing(IMAGENET_MEAN, IMAGENET_STD)
DEFAULT_MINUTES = 15.0
# Options that may differ between a run and the one that goes on with it: they do not change what is learned.
FREE = (
    "output",
    "steps",
    "minutes",
    "num_workers",
    "checkpoint_every",
    "log_every",
    "probe",
    "resume",
    "debug",
)


class Purpose(IntEnum):
    """What a derived seed is for: two purposes never share random numbers. The values are part of a run."""

    WEIGHTS = 0
    DOMAIN = 1
    CROPS = 2
    MASKS = 3


@dataclass
class PretrainConfig:
    """One pretraining."""

    output: str
    """File for the encoder's weights, NAME.safetensors: what --pretrained and --teacher-weights read."""
    model: str = "dinov2_vit_tiny"
    """Name of an encoder, for example sam_vit_tiny."""
    objective: Literal["contrast", "mim", "distill"] = "contrast"
    """contrast: find the patches that show the same ground in another season and by another sensor; mim: fill
    in masked pixels; distill: predict, from a masked view, the features that a moving average of the encoder
    has of the whole."""
    data: Literal["synthetic"] = "synthetic"
    """Where the unlabelled scenes come from."""
    leave_out: str = ""
    """Domains to leave out besides the benchmark's targets, with blanks between them; one may be named in
    part: 'region=coast bands=irrg,climate=arid'."""
    image_size: int | None = None
    """Side of the crops in pixels (default: the encoder's own size)."""

    steps: int | None = None
    """Optimiser steps (default: see --minutes)."""
    minutes: float | None = None
    """Time that the steps may take, where no --steps are given: the first seconds measure how many fit
    (default: 15)."""
    batch_size: int = 16
    """Crops per optimiser step."""
    lr: float = 2e-3
    """Learning rate after the warm-up, which takes a tenth of the steps, at most 250."""
    seed: int = 0
    """Seed of the weights, the scenes and everything random."""
    num_workers: int | None = None
    """Processes that render scenes ahead (default: the cores less one, at most 4)."""
    device: str | None = None
    """cpu or cuda (default: cuda where there is one)."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Compute type; bf16 is autocast over fp32 weights (default: bf16 on cuda, fp32 on cpu)."""

    resume: Literal["auto"] | None = None
    """auto: go on from where a run to the same --output was stopped, or start where there was none."""
    checkpoint_every: int = 500
    """Steps between states to resume from; one is always written on Ctrl-C."""
    log_every: int = 50
    """Steps between lines of progress."""
    probe: bool = True
    """Measure the features at the end: a linear classifier on them, against the same encoder untrained."""
    debug: bool = False
    """Show the traceback of an error."""

    @property
    def state_path(self) -> Path:
        """What a stopped run leaves: beside the output, gone when that is written."""
        return Path(self.output).with_suffix(".resume.safetensors")

    def identity(self) -> dict[str, Any]:
        """What must not change between a stopped run and the one that goes on with it."""
        return {key: value for key, value in vars(self).items() if key not in FREE}


def resolve(config: PretrainConfig) -> PretrainConfig:
    """Check everything that needs no model; ValueError in one line."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("pretrain runs in one process; start it as `rsmodels pretrain`, without torchrun")
    if config.model not in list_encoders():
        raise ValueError(
            f"--model {config.model!r}: no such encoder; choose one of {', '.join(list_encoders())}"
        )
    positive = {
        "--steps": config.steps,
        "--minutes": config.minutes,
        "--image-size": config.image_size,
        "--batch-size": config.batch_size,
        "--lr": config.lr,
        "--checkpoint-every": config.checkpoint_every,
        "--log-every": config.log_every,
    }
    for option, number in positive.items():
        if number is not None and not number > 0:
            raise ValueError(f"{option} must be above 0, not {number}")
    for option, number in {"--seed": config.seed, "--num-workers": config.num_workers}.items():
        if number is not None and number < 0:
            raise ValueError(f"{option} must be 0 or more, not {number}")
    if config.objective != "mim" and config.batch_size < 2:
        raise ValueError(
            f"--batch-size {config.batch_size}: --objective {config.objective} compares the crops of a "
            "batch; give at least 2"
        )
    if config.steps is not None and config.minutes is not None:
        raise ValueError(
            f"--steps {config.steps} and --minutes {config.minutes:g} both set the length; give one"
        )
    check_output(config.output, ".safetensors")
    minutes = DEFAULT_MINUTES if config.steps is None and config.minutes is None else config.minutes
    return replace(config, minutes=minutes)


def check_unused(config: PretrainConfig) -> None:
    """ValueError where another run has come to the same output, or part of the way. Asked by who holds it."""
    if config.resume is not None:
        return
    if Path(config.output).exists():
        raise ValueError(f"--output {config.output}: already exists; give another name, or remove it")
    if config.state_path.exists():
        raise ValueError(
            f"--output {config.output}: a run was stopped here ({config.state_path}); go on with --resume "
            "auto, give another name, or remove that file"
        )
