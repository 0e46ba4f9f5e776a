"""What a training run can be told: one dataclass, whose fields are the command line and the YAML recipes.

The line under a field is its help text. `None` means "chosen for you", and the text says how.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from rsmodels import files
from rsmodels.data import list_datasets
from rsmodels.registry import METHODS, TEACHER_OF, TEACHERS, model_for_method


@dataclass
class OptimConfig:
    """AdamW and its schedule. What is left open is the method's (see registry.Method), or else PUBLISHED."""

    lr: float | None = None
    """Learning rate after the warm-up (default: the method's: 5e-3 for rs-sam and sam-lora, 1e-3 for ktda,
    1e-4 for rein and crossearth)."""
    warmup: int | None = None
    """Steps of linear warm-up (default: 250, or a tenth of a run shorter than 2,500 steps)."""
    warmup_start: float | None = None
    """Learning rate of the first step of warm-up, as a share of --optim.lr (default: the method's: 1e-3 for
    ktda; else one over the steps of warm-up)."""
    power: float = 0.9
    """Exponent of the polynomial decay to zero."""
    horizon: int | None = None
    """Step at which the decay reaches zero, where the run ends before it (default: the run's length)."""
    weight_decay: float | None = None
    """Decoupled weight decay of matrices and convolutions; norms and biases have none (default: the method's:
    0.1 for rs-sam and sam-lora, 0.01 for ktda, 0.05 for rein and crossearth)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's two averaging factors."""
    clip: float = 1.0
    """Largest global gradient norm; 0 leaves gradients as they are."""


# The published values of RS-SAM's baseline, SAM LoRA, for methods that name none of their own.
PUBLISHED: dict[str, Any] = {"lr": 5e-3, "weight_decay": 0.1}


@dataclass
class LoaderConfig:
    """How samples of the data set become batches. RS-SAM augments nothing."""

    scale: tuple[float, float] | None = None
    """Resize training tiles at random before they are cropped: least and largest short side, as shares of
    --image-size, such as 0.5,2 (default: tiles keep their size)."""
    max_class_share: float | None = None
    """Look at up to ten random crops for one in which no class has more than this share of the labelled
    pixels (default: the first crop is taken)."""
    flip: bool = False
    """Mirror training tiles at random, left to right and top to bottom."""
    photometric: bool = False
    """Change brightness, contrast and saturation of training tiles at random."""
    cache: bool = False
    """Keep decoded tiles in memory; every worker process keeps its own."""
    normalize: Literal["model", "dataset"] = "model"
    """Mean and standard deviation: the pretrained model's, or measured on the training split."""


@dataclass
class TrainConfig:
    """One training run."""

    method: str = field(default="rs-sam", metadata={"choices": METHODS})
    """Training recipe of a paper, or of its baseline."""
    model: str | None = None
    """Size, as tiny, vit_b or convnext_b, or a full name as `rsmodels models` lists them
    (default: tiny for synthetic data, the paper's for any other)."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Arguments for the model, for example --model-args.mff false."""
    pretrained: str | None = None
    """Checkpoint of the encoder to start from, for example sam_vit_b_01ec64.pth (default: random weights)."""

    teacher: str | None = None
    """Frozen encoder to learn from, such as dinov2_vit_b (default: the one the model is made for)."""
    teacher_weights: str | None = None
    """Checkpoint of the teacher, for example dinov2_vitb14_pretrain.pth (default: random weights)."""
    teacher_args: dict[str, Any] = field(default_factory=dict)
    """Arguments for the teacher, for example --teacher-args.registers 4."""
    teacher_fit: Literal["pad", "resize"] = "pad"
    """How images get to a multiple of the teacher's patch: zeros at the bottom and right, or stretched."""
    teacher_cache: str | None = None
    """Folder to keep the teacher's maps in, a file per tile, for tiles that are neither cropped nor augmented
    at random; runs may share it (default: none is kept)."""

    data: str = "synthetic"
    """Name of the data set."""
    root: str | None = None
    """Folder of the data set; synthetic data needs none."""
    data_args: dict[str, Any] = field(default_factory=dict)
    """Arguments for the data set, for example --data-args.classes classes.yaml."""
    bands: tuple[int, ...] | None = None
    """Bands to read, counted from 1, in this order (default: all of them)."""
    image_size: int | None = None
    """Side of the training crop in pixels (default: the smaller side of the first tile, rounded down to a
    multiple of 32, at most 512)."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    """From samples to batches."""
    num_workers: int | None = None
    """Processes per rank that read data ahead (default: the cores of this rank less one, at most 4)."""

    run_dir: str | None = None
    """Folder of the run (default: runs/DATA-MODEL, or the run that --resume PATH names)."""
    steps: int | None = None
    """Optimiser steps; where both are given, --steps wins over --epochs (default: see --epochs)."""
    epochs: float | None = None
    """Passes over the training split, where no --steps are given (default: the paper's 200; 5 for synthetic
    data)."""
    batch_size: int = 8
    """Tiles per optimiser step, over all ranks together, so that a recipe means the same on any machine."""
    accumulate: int = 1
    """Split every rank's share of the batch into this many passes, to save memory."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser and schedule."""
    seed: int = 0
    """Seed of the weights, the data order and everything random."""

    device: str | None = None
    """cpu or cuda (default: cuda where there is one)."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Compute type; bf16 is autocast over fp32 weights (default: bf16 on cuda, fp32 on cpu)."""
    parallel: Literal["none", "ddp", "fsdp", "hsdp"] | None = None
    """How ranks share the model (default: fsdp under torchrun, none for one process)."""
    shard_size: int | None = None
    """Ranks that hold one copy of the model between them under hsdp (default: the ranks of one node)."""
    activation_checkpointing: bool | None = None
    """Recompute the encoder's blocks in backward: less memory, about a third more time (default: the model's:
    on for rein and crossearth but their tiny models, off for the others)."""
    deterministic: bool = False
    """Ask CUDA for kernels that repeat to the last bit; the CPU always does."""

    resume: str | None = None
    """auto: go on from the run's newest checkpoint, or start where there is none; or a checkpoint's path."""
    checkpoint_every: int = 200
    """Steps between checkpoints; one is always written at the end and on Ctrl-C."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""
    validate_every: int | None = None
    """Steps between validations, which choose best/ by the lowest loss (default: one epoch)."""
    log_every: int = 10
    """Steps between lines of log.jsonl."""
    report: bool = True
    """Evaluate best/ and write report/ at the end."""
    debug: bool = False
    """Show the traceback of an error."""


TEACHER_OPTIONS = ("teacher", "teacher_weights", "teacher_args", "teacher_fit", "teacher_cache")


def resolve(config: TrainConfig) -> TrainConfig:
    """Check everything that needs no file and fill in what follows from names; ValueError in one line."""
    _check_choice("--method", config.method, METHODS)
    _check_choice("--data", config.data, list_datasets())
    method = METHODS[config.method]
    model = model_for_method(
        config.method, config.model or ("tiny" if config.data == "synthetic" else method.variant)
    )
    if config.data != "synthetic" and config.root is None:
        raise ValueError(f"--data {config.data} needs --root: the folder that holds the data set")
    for name in ("num_classes", "image_size", "pretrained", "bands"):
        if name in config.model_args:
            where = (
                "comes from the data set" if name == "num_classes" else f"has its own option, {_option(name)}"
            )
            raise ValueError(f"--model-args.{name}: {where}")
    for name in ("pretrained", "teacher_weights", "teacher_cache"):
        if getattr(config, name) == "":  # a script's variable that was not set
            raise ValueError(f"{_option(name)} '': is empty; give a path, or leave it out")
    published = {**PUBLISHED, **method.optim}
    open_fields = {name: value for name, value in published.items() if getattr(config.optim, name) is None}
    config = replace(config, optim=replace(config.optim, **open_fields))
    _check_numbers(config)
    _check_parallel(config)
    teacher = _teacher(config, model)
    epochs = config.epochs
    if config.steps is not None:
        epochs = None  # one length in config.yaml, the one that counts
    elif epochs is None:
        epochs = 5.0 if config.data == "synthetic" else 200.0
    run_dir = config.run_dir or run_of(config.resume) or f"runs/{config.data}-{model}"
    return replace(config, model=model, teacher=teacher, epochs=epochs, run_dir=run_dir)


def _teacher(config: TrainConfig, model: str) -> str | None:
    """The teacher's name, and whether what is said of it makes sense."""
    own = TEACHER_OF.get(model)
    if own is None:
        untouched = TrainConfig()
        given = [name for name in TEACHER_OPTIONS if getattr(config, name) != getattr(untouched, name)]
        if given:
            learning = [
                name
                for name, method in sorted(METHODS.items())
                if any(student.startswith(f"{method.family}_") for student in TEACHER_OF)
            ]
            raise ValueError(
                f"{_option(given[0])} {getattr(config, given[0])}: {model} learns from no teacher; leave it "
                f"out, or choose --method {' or '.join(learning)}"
            )
        return None
    teacher = config.teacher or own
    _check_choice("--teacher", teacher, TEACHERS)
    for name in ("name", "image_size", "fit", "pretrained"):
        if name in config.teacher_args:
            raise ValueError(
                f"--teacher-args.{name}: has its own option: --teacher, --image-size, --teacher-fit or "
                "--teacher-weights"
            )
    random = [name for name in ("scale", "flip", "photometric") if getattr(config.loader, name)]
    if config.teacher_cache is not None and random:
        raise ValueError(
            f"--teacher-cache {config.teacher_cache}: --loader.{random[0]} changes tiles at random, so that "
            "no image comes twice and the cache would only fill the disk; leave one of them out"
        )
    return teacher


def unused_length(config: TrainConfig) -> list[str]:
    """What to say of two lengths, as from a recipe's epochs and the command line's --steps."""
    if config.steps is None or config.epochs is None:
        return []
    return [f"--steps {config.steps} sets the length; --epochs {config.epochs:g} is not used"]


def run_of(resume: str | None) -> str | None:
    """The run folder that `--resume PATH` lies in, by its name; None for auto and for a checkpoint that lies
    outside of any run."""
    if resume is None or resume == "auto":
        return None
    path = Path(os.path.abspath(resume))
    if path.name.startswith("step-"):
        return _above(resume, 2) if path.parent.name == "checkpoints" else None
    return _above(resume, 1 if path.name == "checkpoints" else 0)


def _above(path: str, levels: int) -> str:
    """`levels` folders up, relative where `path` is."""
    return os.path.normpath(os.path.join(path, *[".."] * levels))


def _check_choice(option: str, value: str, choices: Iterable[str]) -> None:
    choices = sorted(choices)
    if value in choices:
        return
    near = difflib.get_close_matches(value, choices, n=1)
    advice = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"{option} {value!r} is not known; {advice}choose one of {', '.join(choices)}")


def _check_numbers(config: TrainConfig) -> None:
    positive = {
        "steps": config.steps,
        "epochs": config.epochs,
        "image_size": config.image_size,
        "batch_size": config.batch_size,
        "accumulate": config.accumulate,
        "checkpoint_every": config.checkpoint_every,
        "keep_checkpoints": config.keep_checkpoints,
        "validate_every": config.validate_every,
        "log_every": config.log_every,
        "shard_size": config.shard_size,
        "optim.lr": config.optim.lr,
        "optim.horizon": config.optim.horizon,
    }
    at_least_zero = {
        "seed": config.seed,
        "num_workers": config.num_workers,
        "optim.warmup": config.optim.warmup,
        "optim.warmup_start": config.optim.warmup_start,
        "optim.power": config.optim.power,
        "optim.weight_decay": config.optim.weight_decay,
        "optim.clip": config.optim.clip,
    }
    for name, value in positive.items():
        if value is not None and not value > 0:
            raise ValueError(f"{_option(name)} must be above 0, not {value}")
    for name, value in at_least_zero.items():
        if value is not None and not value >= 0:
            raise ValueError(f"{_option(name)} must be 0 or more, not {value}")
    if config.optim.warmup_start is not None and config.optim.warmup_start > 1:
        raise ValueError(
            f"--optim.warmup-start is a share of --optim.lr, at most 1, not {config.optim.warmup_start}"
        )
    scale, share = config.loader.scale, config.loader.max_class_share
    if scale is not None and not 0 < scale[0] <= scale[1]:
        raise ValueError(f"--loader.scale must be two shares above 0, the smaller first, not {list(scale)}")
    if share is not None and not 0 < share <= 1:
        raise ValueError(
            f"--loader.max-class-share is a share of the pixels, above 0 and at most 1, not {share}"
        )
    if not all(0 <= beta < 1 for beta in config.optim.betas):
        raise ValueError(f"--optim.betas must lie in [0, 1), not {list(config.optim.betas)}")
    if config.bands is not None and (not config.bands or min(config.bands) < 1):
        raise ValueError(f"--bands count from 1, and there is at least one, not {list(config.bands)}")


def _check_parallel(config: TrainConfig) -> None:
    if config.device not in (None, "cpu", "cuda"):
        raise ValueError(
            f"--device {config.device!r} is not known; choose cpu or cuda (torchrun picks the GPU)"
        )
    if config.shard_size is not None and config.parallel != "hsdp":
        raise ValueError(f"--shard-size {config.shard_size} belongs to --parallel hsdp; leave it out")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain YAML and JSON have it: dictionaries, lists, numbers, strings."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value

    return plain(asdict(config))


def write_config(config: TrainConfig, path: Path) -> None:
    """Write the configuration to `path` as YAML that `--config` replays: complete but for `resume`, which
    would go on with a run and not repeat it."""
    options = to_dict(config)
    del options["resume"]
    files.write_text(path, yaml.safe_dump(options, sort_keys=False))


def changed_options(
    before: dict[str, Any], after: dict[str, Any], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Options that differ between two configurations as plain dictionaries: {"optim.lr": (old, new)}."""
    changed: dict[str, tuple[Any, Any]] = {}
    for name in before.keys() | after.keys():
        old, new = before.get(name), after.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            changed |= changed_options(old, new, f"{prefix}{name}.")
        elif old != new:
            changed[f"{prefix}{name}"] = (old, new)
    return dict(sorted(changed.items()))
