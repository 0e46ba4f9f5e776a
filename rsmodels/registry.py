"""Models and encoders by name: how they announce themselves, how they are created, saved and loaded.

The registry knows no model: `@register_model` and `@register_encoder` put builder functions into it, and
`rsmodels/__init__.py` imports the packages that hold them. A builder forwards its `**options` to the class
that it is annotated to return; that class's keyword-only parameters are the options users may give.
"""

import difflib
import fnmatch
import functools
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints, overload

import torch
from torch import Tensor, nn

from rsmodels.arguments import check_options
from rsmodels.files import atomic_directory, read_json, write_json
from rsmodels.weights import read_state, save_state

LIBRARY_VERSION = "0.1.0"

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])

MODELS: dict[str, Callable[..., nn.Module]] = {}
ENCODERS: dict[str, Callable[..., nn.Module]] = {}
# Options of a model's or an encoder's class that its builder settles, by the name of either.
FIXED_OPTIONS: dict[str, tuple[str, ...]] = {}
# What --method knows.
METHODS: dict[str, "Method"] = {}
# Encoders that can teach → the builder of the teacher; models that learn from one → theirs by default.
TEACHERS: dict[str, Callable[..., nn.Module]] = {}
TEACHER_OF: dict[str, str] = {}
# What create_model gives for an option that names a file whose content comes with a state dict.
FROM_STATE = "<state dict>"


@dataclass(frozen=True)
class Method:
    """A paper's recipe: the family of models, the paper's variant, its settings of the optimiser by the
    names of the trainer's options."""

    family: str
    variant: str
    optim: Mapping[str, Any]


@dataclass(frozen=True)
class Preprocessing:
    """What a model expects of its input: which bands of a file, in which order, and their normalisation.

    `bands` are 1-based indices into the file; None means its first len(mean). `mean` and `std` are in the
    units of the raw pixels.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    bands: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("mean", "std", "bands"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(value))
        if len(self.mean) != len(self.std) or (self.bands is not None and len(self.bands) != len(self.mean)):
            raise ValueError(
                f"mean {self.mean}, std {self.std}, bands {self.bands}: expected one value per band in each"
            )
        if not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean}, std {self.std}: expected finite numbers, and std above 0")
        if self.bands is not None and min(self.bands) < 1:
            raise ValueError(f"bands {self.bands}: expected bands counted from 1")

    def normalize(self, images: Tensor) -> Tensor:
        """Raw (B, C, H, W) values, already in the model's band order → float32 (images − mean) / std."""
        if images.ndim != 4 or images.shape[1] != len(self.mean):
            raise ValueError(
                f"images of shape {tuple(images.shape)}: this model takes (B, {len(self.mean)}, H, W); "
                "pick its bands with bands="
            )
        # non_blocking: torch.tensor(..., device=) would wait for what the device is computing.
        mean, std = (
            torch.tensor(values).to(images.device, non_blocking=True).view(1, -1, 1, 1)
            for values in (self.mean, self.std)
        )
        return (images.float() - mean) / std


# In 8-bit units; the statistics of timm's networks, of SAM and of DINOv2.
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@overload
def register_model(builder: Builder) -> Builder: ...
@overload
def register_model(
    *, fixed: tuple[str, ...] = (), teacher: str | None = None
) -> Callable[[Builder], Builder]: ...
def register_model(builder: Any = None, *, fixed: tuple[str, ...] = (), teacher: str | None = None) -> Any:
    """Make `builder(*, num_classes, ...)` known to create_model under its own name.

    `@register_model(fixed=(...))` names options of the model's class that the builder settles itself, and
    `teacher=` the encoder that training lets the model learn from: its losses then take "teacher" with the
    batch (see create_teacher), and it has `transfers`, `teacher_dim` and `grid_size`.
    """
    if builder is None:
        return functools.partial(register_model, fixed=fixed, teacher=teacher)
    FIXED_OPTIONS[builder.__name__] = fixed
    if teacher is not None:
        TEACHER_OF[builder.__name__] = teacher
    return _register(MODELS, builder)


@overload
def register_encoder(builder: Builder) -> Builder: ...
@overload
def register_encoder(*, fixed: tuple[str, ...]) -> Callable[[Builder], Builder]: ...
def register_encoder(builder: Any = None, *, fixed: tuple[str, ...] = ()) -> Any:
    """Make `builder(*, image_size, ...)` known to create_backbone under its own name; see register_model."""
    if builder is None:
        return functools.partial(register_encoder, fixed=fixed)
    FIXED_OPTIONS[builder.__name__] = fixed
    return _register(ENCODERS, builder)


def register_teacher(encoder: str, builder: Callable[..., nn.Module]) -> None:
    """Make `builder(*, image_size, fit, **options of the encoder)` known to create_teacher."""
    TEACHERS[encoder] = builder


def register_method(
    method: str, family: str, *, variant: str = "vit_b", optim: Mapping[str, Any] | None = None
) -> None:
    """Say that `method` (as in --method) trains the models named `family`_...; see Method."""
    METHODS[method] = Method(family, variant, optim or {})


def _register(table: dict[str, Callable[..., nn.Module]], builder: Builder) -> Builder:
    assert builder.__name__ not in table, f"{builder.__name__} is registered twice"
    table[builder.__name__] = builder
    return builder


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models that match a shell pattern, sorted."""
    return sorted(fnmatch.filter(MODELS, pattern))


def list_encoders(pattern: str = "*") -> list[str]:
    """Names of the encoders that match a shell pattern, sorted."""
    return sorted(fnmatch.filter(ENCODERS, pattern))


def model_for_method(method: str, variant: str) -> str:
    """The model's name for a method and a variant: ("rs-sam", "vit_b") → "rs_sam_vit_b".

    A full model name of the method's family is taken as it is.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r}: no such method; {_suggest(method, METHODS)}")
    family = METHODS[method].family
    name = variant if variant in MODELS else f"{family}_{variant}"
    if name not in MODELS or not name.startswith(f"{family}_"):
        raise ValueError(
            f"model {variant!r}: method {method} has none of that name; "
            f"expected one of {', '.join(list_models(f'{family}_*'))}"
        )
    return name


def create_model(
    name: str,
    *,
    num_classes: int,
    image_size: int | tuple[int, int] | None = None,
    pretrained: str | None = None,
    state_follows: bool = False,
    **options: Any,
) -> Any:
    """Build the segmentation model `name`.

    Args:
        name: one of list_models().
        num_classes: K, the number of logits; 1 means binary.
        image_size: pixels, one number or (H, W); None takes the model's own.
        pretrained: a checkpoint of the model's foundation model, a file or a hub id; its parts that fit are
            loaded and a report is printed.
        state_follows: the caller fills all of the model from a state dict: files that options name (the
            model's `file_options`) are not read.
        options: the model's own; an unknown one is a ValueError that lists them.
    """
    builder = _look_up(MODELS, name, "model")
    if image_size is not None:
        options["image_size"] = tuple(image_size) if isinstance(image_size, list) else image_size
    check_options(builder, name, options, settled=FIXED_OPTIONS.get(name, ()))
    if not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes={num_classes}: expected 1 (binary) or the number of classes")
    files = getattr(get_type_hints(builder)["return"], "file_options", ()) if state_follows else ()
    model: Any = builder(num_classes=num_classes, **{**options, **dict.fromkeys(files, FROM_STATE)})
    model.model_name = name
    model.arguments = {"num_classes": num_classes, **options, "image_size": list(model.image_size)}
    model.base_weights = None
    if pretrained is not None:
        model.base_weights = model.load_pretrained(pretrained).sha256
    return model


def create_backbone(
    name: str,
    *,
    out_indices: tuple[int, ...],
    image_size: int | tuple[int, int] | None = None,
    pretrained: str | None = None,
    **options: Any,
) -> Any:
    """Build the encoder `name` as a timm-like backbone: `.feature_info`, forward → list of (B, C, h, w).

    Args:
        name: one of list_encoders().
        out_indices: blocks whose outputs are returned, ascending.
        image_size, pretrained, options: as in create_model.
    """
    builder = _look_up(ENCODERS, name, "encoder")
    if image_size is not None:
        options["image_size"] = image_size
    check_options(builder, name, options, settled=FIXED_OPTIONS.get(name, ()))
    encoder: Any = builder(**options)
    if pretrained is not None:
        encoder.load_pretrained(pretrained)
    return encoder.features_only(out_indices)


def create_teacher(
    name: str,
    *,
    image_size: int | tuple[int, int],
    fit: str = "pad",
    pretrained: str | None = None,
    **options: Any,
) -> Any:
    """Build the frozen teacher `name`: normalised images (B, 3, H, W) → a list of maps (B, D, h, w), what a
    model that learns from a teacher takes as batch["teacher"].

    Args:
        name: one of TEACHERS.
        image_size: pixels, one number or (H, W), of any size.
        fit: how images get to a multiple of the patch: "pad" adds zeros, "resize" stretches.
        pretrained, options: as in create_model, of the encoder.
    """
    teacher: Any = _look_up(TEACHERS, name, "teacher")
    check_options(ENCODERS[name], name, options, settled=("image_size", *FIXED_OPTIONS.get(name, ())))
    teacher = teacher(image_size=image_size, fit=fit, **options)
    if pretrained is not None:
        teacher.load_pretrained(pretrained)
    return teacher


def _look_up(table: Mapping[str, Callable[..., nn.Module]], name: str, what: str) -> Callable[..., nn.Module]:
    if name not in table:
        raise ValueError(f"{what} {name!r}: no such {what}; {_suggest(name, table)}")
    return table[name]


def _suggest(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(sorted(known))}"


def parameter_counts(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Parameters per module, as (all, trainable), and their "total": the model card's table."""

    def count(module: nn.Module) -> tuple[int, int]:
        parameters = list(module.parameters())
        return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)

    counts = {name: count(child) for name, child in model.named_children()}
    own = list(model.parameters(recurse=False))
    if own:
        counts["own"] = sum(p.numel() for p in own), sum(p.numel() for p in own if p.requires_grad)
    return {**counts, "total": count(model)}


def save_model(
    model: Any,
    directory: str | os.PathLike[str],
    info: Mapping[str, Any] | None = None,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write `model` as a folder of model.safetensors and model.json, all or nothing.

    Args:
        directory: new, empty, or written by save_model before.
        info: entries for model.json: classes, palette, binary, ignore_index, training, ...
        state_dict: the full weights where the model itself holds only shards of them.
    """
    directory = Path(directory)
    foreign = (
        {p.name for p in directory.iterdir()} - {"model.safetensors", "model.json"}
        if directory.is_dir()
        else ()
    )
    if foreign:
        raise ValueError(
            f"{directory}: holds other files ({', '.join(sorted(foreign)[:3])}); save into a new folder"
        )
    preprocessing: Preprocessing = model.preprocessing
    record = {
        "model": model.model_name,
        "arguments": model.arguments,
        "classes": None,
        "palette": None,
        "binary": model.num_classes == 1,
        "ignore_index": 255,
        "bands": preprocessing.bands,
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "image_size": list(model.image_size),
        "base_weights": model.base_weights,
        "library_version": LIBRARY_VERSION,
        "training": {},
        **(info or {}),
    }
    with atomic_directory(directory) as temporary:
        save_state(model.state_dict() if state_dict is None else state_dict, temporary / "model.safetensors")
        write_json(temporary / "model.json", record)


def load_model(
    directory: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    model: str | None = None,
    **overrides: Any,
) -> tuple[Any, dict[str, Any]]:
    """Read what save_model wrote: (the model in eval mode, the content of model.json).

    Args:
        directory: e.g. runs/NAME/best.
        model: the name that the caller expects; another one in the folder is a ValueError.
        overrides: arguments of create_model to change, e.g. image_size: position tables are resized; mean,
            std and bands go before those of model.json.
    """
    directory = Path(directory)
    record_path, weights_path = directory / "model.json", directory / "model.safetensors"
    for path in (record_path, weights_path):
        if not path.is_file():
            best = directory / "best"
            advice = f"did you mean {best}?" if (best / path.name).is_file() else "as runs/NAME/best"
            raise FileNotFoundError(
                f"{path}: no such file; expected a folder with model.json and model.safetensors; {advice}"
            )
    info = read_json(record_path)
    for key in ("model", "arguments", "mean", "std"):
        if not isinstance(info, dict) or key not in info:
            raise ValueError(f"{record_path}: has no entry {key!r}; expected what rsmodels.save_model writes")
    if model is not None and info["model"] != model:
        raise ValueError(f"{record_path}: holds {info['model']}, expected {model}; give that model's folder")

    arguments: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in info["arguments"].items()
    }
    arguments |= overrides
    loaded = create_model(info["model"], state_follows=True, **arguments)
    loaded.base_weights = info.get("base_weights")
    saved = Preprocessing(info["mean"], info["std"], info.get("bands"))
    own = {key: getattr(loaded.preprocessing, key) for key in ("mean", "std", "bands") if key in overrides}
    loaded.preprocessing = replace(saved, **own)
    state = read_state(weights_path)
    advice = "keep model.json and model.safetensors of one save together"
    if "image_size" in overrides:
        loaded.resize_state(state, saved_size=info.get("image_size"))
        advice += "; where the model is built for one image size, load it without image_size="
    _load_whole(loaded, state, weights_path, f"{info['model']} {json.dumps(info['arguments'])}; {advice}")
    return loaded.to(device).eval(), info


def _load_whole(model: nn.Module, state: Mapping[str, Tensor], path: Path, expected: str) -> None:
    own = model.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    misfits = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if missing or unknown or misfits:
        found = (
            f"{len(missing)} tensors missing, {len(unknown)} unknown, {len(misfits)} of another shape "
            f"(first: {(missing + unknown + sorted(misfits))[0]})"
        )
        raise ValueError(f"{path}: weights of another variant: {found}; expected {expected}")
    model.load_state_dict(dict(state))
