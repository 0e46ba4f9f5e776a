"""What a run is made of, from its configuration: data sets, model, optimiser, length, identity."""

from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm

import rskernels
from rskernels import tuning
from rsmodels.arguments import ImageSizeError
from rsmodels.data import IGNORE, SegmentationDataset, create_dataset
from rsmodels.data.transforms import collate, fit_to_size
from rsmodels.registry import Preprocessing, create_model
from rsmodels.training.checkpoint import newest_first
from rsmodels.training.config import OptimConfig, TrainConfig, run_of
from rsmodels.training.parallel import Ranks, start_moments
from rsmodels.training.sampler import Purpose, derive_seed, seed_everything
from rsmodels.training.schedule import learning_rate
from rsmodels.training.teacher import FrozenTeacher

LARGEST_DEFAULT_SIZE = 512  # pixels; the paper's largest input
MEASURED_TILES = 256
NO_BEST: dict[str, Any] = {"loss": math.inf, "step": 0}
MOST_READERS = 4


def run_folder(config: TrainConfig) -> Path:
    """The run's folder, which must not hold a run other than the one that is resumed."""
    folder = Path(str(config.run_dir))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--run-dir {folder}: is a file; give a folder")
    newest = next(iter(newest_first(folder / "checkpoints")), None)
    # A run that ended before its first checkpoint left nothing to lose.
    if newest is None and not (folder / "best").exists():
        return folder
    found = newest.name if newest else "best"
    if config.resume is None:
        raise ValueError(
            f"--run-dir {folder}: already holds a run ({found}); go on with --resume auto, or choose another"
        )
    resumed = run_of(config.resume)
    if config.resume != "auto" and (resumed is None or Path(resumed).resolve() != folder.resolve()):
        raise ValueError(
            f"--run-dir {folder}: already holds another run ({found}) than --resume {config.resume}; go on "
            "with the one it holds by --resume auto, leave --run-dir out, or choose another"
        )
    return folder


def open_split(config: TrainConfig, split: str) -> SegmentationDataset:
    """The data set's `split`, with the bands asked for."""
    options = dict(config.data_args)
    if config.bands is not None:
        options["bands"] = config.bands
    dataset = create_dataset(config.data, root=config.root, split=split, **options)
    if len(dataset) == 0:
        raise ValueError(
            f"data set {config.data!r}: its {split} split is empty; training needs at least one tile"
        )
    return dataset


def report_split(config: TrainConfig) -> tuple[str, str]:
    """The split that the final report looks at, and where that is not test, why.

    Asked before the first step: a run of days must not end in an error about its report.
    """
    try:
        found = len(
            create_dataset(config.data, root=config.root, split="test", strict=False, **config.data_args)
        )
    except FileNotFoundError as error:
        return "val", str(error)
    if not found:
        return "val", "the test split is empty"
    open_split(config, "test")  # whatever else is wrong with it is an error now
    return "test", ""


def share_of_batch(config: TrainConfig, world: int) -> int:
    """Tiles that one rank passes through the model at a time."""
    parts = world * config.accumulate
    if config.batch_size % parts:
        raise ValueError(
            f"--batch-size {config.batch_size} does not split over {world} rank(s) and --accumulate "
            f"{config.accumulate}; choose a multiple of {parts}"
        )
    return config.batch_size // parts


def number_of_steps(config: TrainConfig, tiles: int) -> int:
    """The run's length in optimiser steps."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    return math.ceil(config.epochs * tiles / config.batch_size)


def schedule(config: TrainConfig, steps: int) -> Callable[[int], float]:
    """The learning rate of every step (counted from 0) of a run of `steps`."""
    optim = config.optim
    assert optim.lr is not None  # resolved
    warmup = min(250, steps // 10) if optim.warmup is None else optim.warmup
    if optim.warmup is not None and warmup >= steps:
        raise ValueError(f"--optim.warmup {warmup} must be shorter than the run, which has {steps} steps")
    if optim.horizon is not None and optim.horizon < steps:
        raise ValueError(
            f"--optim.horizon {optim.horizon} must not be shorter than the run, which has {steps} steps: the "
            "learning rate would be zero after it"
        )
    return partial(
        learning_rate,
        base=optim.lr,
        steps=optim.horizon or steps,
        warmup=warmup,
        power=optim.power,
        start=optim.warmup_start,
    )


def reader_processes() -> int:
    """The cores of this rank less one, at most 4."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(0, min(MOST_READERS, cores // ranks_here - 1))


def build_model(config: TrainConfig, dataset: SegmentationDataset, *, resuming: bool) -> Any:
    """The model with the same first weights on every rank; a run that resumes reads no file that they come
    from."""
    first = dataset[0]["image"]
    size = config.image_size or max(32, min(*first.shape[-2:], LARGEST_DEFAULT_SIZE) // 32 * 32)
    seed_everything(derive_seed(config.seed, Purpose.WEIGHTS))
    try:
        model = create_model(
            str(config.model),
            num_classes=dataset.schema.num_logits,
            image_size=size,
            pretrained=None if resuming else config.pretrained,
            state_follows=resuming,
            **config.model_args,
        )
    except ImageSizeError as error:
        raise error.under("--image-size") from None
    expected = len(model.preprocessing.mean)
    if len(first) != expected:
        adapts = "in_chans" in inspect.signature(type(model)).parameters
        advice = (
            f", or adapt the model with --model-args.in_chans {len(first)} and normalise by the data with "
            "--loader.normalize dataset"
        )
        raise ValueError(
            f"data set {config.data!r} gives {len(first)} bands and {config.model} takes {expected}: choose "
            f"{expected} with --bands{advice if adapts else ''}"
        )
    model.preprocessing = Preprocessing(model.preprocessing.mean, model.preprocessing.std, dataset.bands)
    if config.activation_checkpointing is not None:
        model.set_activation_checkpointing(config.activation_checkpointing)
    return model.train()


def measure_statistics(
    dataset: SegmentationDataset, ranks: Ranks
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per band over up to MEASURED_TILES tiles, evenly spread over the data set.

    Every rank reads its share. Pixels without data (IGNORE in the mask and 0 in every band) do not count.
    """
    count = min(len(dataset), MEASURED_TILES)
    chosen = np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist()
    with ranks.together():
        sums = torch.zeros(3, dataset[0]["image"].shape[0], dtype=torch.float64)
        for index in chosen[ranks.rank :: ranks.world]:
            sample = dataset[index]
            image, mask = sample["image"].double(), sample["mask"]
            values = image[:, ~((mask == IGNORE) & (image == 0).all(0))]
            sums += torch.stack([torch.ones_like(values), values, values.square()]).sum(-1)
    pixels, total, squares = ranks.sum(sums)
    if pixels[0] == 0:
        raise ValueError(
            f"data set {dataset.name!r}: no pixel with data in {count} tiles; nothing to normalise by"
        )
    mean = total / pixels
    std = (squares / pixels - mean.square()).clamp(min=0).sqrt()
    if std.min() == 0:
        raise ValueError(
            f"data set {dataset.name!r}: band {int(std.argmin()) + 1} has one value everywhere; leave it out "
            "with --bands"
        )
    return tuple(mean.tolist()), tuple(std.tolist())


@torch.no_grad()
def check_share(model: Any, config: TrainConfig, share: int) -> None:
    """A pass of one tile in which a batch norm of `model` sees one value per channel is a ValueError: it has
    no variance to normalise by. UPerNet pools to such maps."""
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    if share > 1 or not norms:
        return
    starved: list[str] = []

    def look(name: str, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].numel() == inputs[0].shape[1]:
            starved.append(name)

    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: look(name, inputs))
        for name, module in norms.items()
    ]
    model.eval()(torch.zeros(1, len(model.preprocessing.mean), *model.image_size))
    model.train()
    for hook in hooks:
        hook.remove()
    if starved:
        raise ValueError(
            f"--batch-size {config.batch_size} leaves one tile for each rank and pass, and the batch norm "
            f"{starved[0]} of {config.model} cannot train on one value per channel; choose a larger "
            "--batch-size, a smaller --accumulate, or fewer ranks"
        )


def describe_frozen(model: Any) -> list[str]:
    """What the reader should know of weights that nothing has taught and that training will not change."""
    if model.base_weights is not None:
        return []
    stuck = 0
    for block in model.blocks_to_shard():
        frozen = sum(p.numel() for p in block.parameters() if not p.requires_grad)
        # Under LoRA single matrices of a block that learns are frozen: most of the others are not.
        if 2 * frozen > sum(p.numel() for p in block.parameters()):
            stuck += frozen
    if not stuck:
        return []
    return [
        f"{model.model_name}: {stuck / 1e6:.1f} M of its parameters are random and stay so, as they are "
        "frozen; give their checkpoint with --pretrained"
    ]


def check_labelled(dataset: SegmentationDataset, size: tuple[int, int]) -> None:
    """A validation split without one labelled pixel is a ValueError: no loss could choose the best weights.

    Asked before the first step. It reads as far as the first labelled tile, which as a rule is the first.
    """
    for index in range(len(dataset)):
        if (fit_to_size(collate([dataset[index]]), size)["mask"] != IGNORE).any():
            return
    raise ValueError(
        f"data set {dataset.name!r}: every pixel of its val split is {IGNORE}, not labelled ({len(dataset)} "
        f"tiles, {size[0]}x{size[1]} pixels at the centre of each), and so nothing could tell the best "
        "weights; check its masks and classes, or take a larger --image-size"
    )


def make_optimizer(model: Any, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over what is trainable; norms and biases (vectors), and what a model names in its
    `no_weight_decay()`, do not decay."""
    spared = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    assert config.lr is not None  # resolved
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": config.weight_decay},
        {"params": [], "weight_decay": 0.0},
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name in spared or parameter.ndim < 2]["params"].append(parameter)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    start_moments(optimizer, step=0)
    return optimizer


def identity(model: Any, dataset: SegmentationDataset, teacher: FrozenTeacher | None) -> dict[str, Any]:
    """What must not change between a checkpoint and the run that resumes from it, as JSON has it."""
    described = {
        "model": model.model_name,
        "arguments": model.arguments,
        "classes": dataset.schema.classes,
        "bands": dataset.bands,
        "teacher": teacher and teacher.record,
    }
    return json.loads(json.dumps(described))


def best_so_far(path: Path, state: dict[str, Any], folder: Path, steps: int) -> dict[str, Any]:
    """The best validation of the run in `folder` that goes on from the checkpoint `path`, over `steps` steps.

    A run that goes on in another folder has none yet; where no step is left to give it one, a ValueError.
    """
    if (folder / "best").is_dir():
        return state["best"]
    if state["step"] >= steps:
        raise ValueError(
            f"{path}: its run is at step {state['step']} and this one ends at {steps}, so that nothing is "
            f"left to do, and {folder} holds no best model; take more --steps, or go on in its own folder"
        )
    return NO_BEST


def check_same_model(path: Path, state: dict[str, Any], now: dict[str, Any], config: TrainConfig) -> None:
    """A checkpoint of another model, of other classes or bands, or of another teacher is a ValueError.

    state: what the checkpoint holds besides tensors; now: the identity of this run, which `config` describes.
    """
    before = state["identity"]
    for key in now:
        if before.get(key) != now[key]:
            if key == "teacher" and before.get(key) and now[key]:
                files = (state["config"].get("teacher_weights"), config.teacher_weights)
                _refuse_teacher(path, before[key], now[key], drawn=files == (None, None))
            raise ValueError(
                f"{path}: was written with {key} {before.get(key)}, this run has {now[key]}; resume with the "
                "options it was started with (config.yaml), or start anew in another --run-dir"
            )


def _refuse_teacher(path: Path, before: dict[str, Any], now: dict[str, Any], *, drawn: bool) -> NoReturn:
    """drawn: neither run has a file of its teacher's weights; they follow from the seed."""
    option = {"name": "--teacher", "arguments": "--teacher-args", "fit": "--teacher-fit"}
    option["sha256"] = "--seed" if drawn else "--teacher-weights"
    changed = ", ".join(option[name] for name in option if before.get(name) != now.get(name))
    raise ValueError(
        f"{path}: learned from another teacher, {before['name']} with weights {before['sha256'][:12]}; "
        f"resume with the {changed} it was started with (config.yaml), or start anew in another --run-dir"
    )


def kernel_record(world: int) -> dict[str, Any]:
    """What decides over the bits of this run: versions, backend, matrix products, ranks and their threads."""
    return {
        "torch": torch.__version__,
        "rskernels": rskernels.__version__,
        "backend": rskernels.get_backend(),
        "instruction_set": rskernels.instruction_set(),
        "ranks": world,
        "threads": torch.get_num_threads(),
        "tuning": tuning.record(),
    }


def changed_kernels(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for everything in which two kernel records differ."""
    lines = [
        f"changed since: {name} {before[name]} -> {now[name]}; the last bits may differ"
        for name in now
        if name != "tuning" and name in before and before[name] != now[name]
    ]
    if before["tuning"]["products"] != now["tuning"]["products"]:
        lines.append("changed since: the table of matrix products; the checkpoint's is used")
    if before["tuning"].get("triton", {}) != now["tuning"]["triton"]:
        lines.append("changed since: the tuned Triton configurations; the checkpoint's are used")
    return lines
