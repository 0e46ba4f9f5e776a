"""Weights in and out: SAM checkpoints, whole models, adapters, and a report of what went where.

Files are .safetensors, or .pth read with `weights_only=True`: no checkpoint runs code. Three layouts of SAM
are understood: the official one (`image_encoder.*`, `prompt_encoder.*`, `mask_decoder.*`), timm's samvit
(`blocks.*.mlp.fc1`) and bare encoders (`blocks.*.mlp.lin1`). Whatever of an encoder finds no place, and
whatever an encoder needs and does not find, is an error; the rest is in the report.
"""

import hashlib
import json
import os
import pickle
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rsmodels.files import atomic_path

State = dict[str, Tensor]
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
# (embedding dimension, blocks) of the published encoders: to name a checkpoint of another variant.
SAM_VARIANTS = {(768, 12): "vit_b", (1024, 24): "vit_l", (1280, 32): "vit_h", (128, 4): "tiny"}


@dataclass
class LoadReport:
    """What became of every tensor of a checkpoint and of every parameter of the model."""

    source: str
    sha256: str
    loaded: list[str] = field(default_factory=list)
    resized: dict[str, str] = field(default_factory=dict)
    initialised: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.loaded)} tensors loaded, {len(self.resized)} of them resized"]
        lines += [f"  resized: {key} ({how})" for key, how in _collapse(self.resized)]
        lines += [f"  newly initialised: {key}" for key, _ in _collapse(dict.fromkeys(self.initialised, ""))]
        lines += [f"  dropped: {key} ({why})" for key, why in _collapse(self.dropped)]
        return "\n".join(lines)

    def finish(self, model: nn.Module) -> None:
        """Note what of `model` no tensor was loaded for; print the report to stderr, once per job."""
        loaded = set(self.loaded)
        self.initialised = [key for key in model.state_dict() if key not in loaded]
        if os.environ.get("RANK", "0") == "0":
            print(self, file=sys.stderr)


def _collapse(entries: Mapping[str, str]) -> list[tuple[str, str]]:
    """blocks.0.x, blocks.1.x, ... with the same remark become one line, blocks.*.x [12 tensors]."""
    counts: dict[tuple[str, str], int] = {}
    for key, remark in entries.items():
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", key)
        counts[pattern, remark] = counts.get((pattern, remark), 0) + 1
    return [
        (f"{key} [{count} tensors]" if count > 1 else key, remark) for (key, remark), count in counts.items()
    ]


@dataclass
class SamCheckpoint:
    """A SAM checkpoint under the official names: the image encoder (without its prefix), and the rest."""

    source: str
    sha256: str
    encoder: State
    rest: State


def resolve(source: str | os.PathLike[str]) -> Path:
    """The local file that `source` names: a path, or a hub id ("owner/name" or "owner/name/file")."""
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        raise ValueError(
            f"{path}: is a folder; expected a checkpoint file ({', '.join(SUFFIXES)}) or a hub id"
        )
    owner, _, rest = str(source).partition("/")
    name, _, filename = rest.partition("/")
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w./-]+)?", str(source)) and not owner.startswith(".")
    if not is_hub_id or Path(name).suffix in SUFFIXES:
        raise FileNotFoundError(
            f"{source}: no such file; give a checkpoint ({', '.join(SUFFIXES)}) or a hub id, OWNER/NAME or "
            "OWNER/NAME/FILE"
        )
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ValueError(
            f"{source}: no such file, and a hub id needs huggingface_hub; pip install huggingface_hub"
        ) from None
    try:
        return Path(hf_hub_download(f"{owner}/{name}", filename or "model.safetensors"))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{source}: no such file, and the hub did not deliver it ({reason})"
        ) from None


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def read_state(
    path: str | os.PathLike[str], *, wrapped_in: tuple[str, ...] = ("model", "state_dict")
) -> State:
    """The tensors of a .safetensors or .pth file by name; a .pth may wrap them in an entry."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path}: not readable as weights ({reason}); expected .safetensors or a .pth of plain tensors"
        ) from None
    for key in wrapped_in:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: expected a state dict (tensors by name), found {type(state).__name__}")
    return state


def read_sam(source: str | os.PathLike[str]) -> SamCheckpoint:
    """Read a SAM checkpoint in any of the layouts above."""
    path = resolve(source)
    state = read_state(path)
    if any(key.startswith("image_encoder.") for key in state):
        encoder = {
            k.removeprefix("image_encoder."): v for k, v in state.items() if k.startswith("image_encoder.")
        }
        rest = {key: value for key, value in state.items() if not key.startswith("image_encoder.")}
    elif "patch_embed.proj.weight" in state and any(key.startswith("blocks.0.") for key in state):
        encoder, rest = {}, {}
        for key, value in state.items():
            key = key.replace(".mlp.fc1.", ".mlp.lin1.").replace(".mlp.fc2.", ".mlp.lin2.")
            (rest if key.startswith("head.") else encoder)[key] = value
    else:
        raise ValueError(
            f"{path}: no SAM image encoder in it (first keys: {_first(state)}); expected the official layout "
            "(image_encoder.*), timm's samvit or a bare encoder (patch_embed.*, blocks.*)"
        )
    return SamCheckpoint(str(source), sha256_of(path), encoder, rest)


def load_encoder(
    encoder: Any,
    checkpoint: SamCheckpoint,
    report: LoadReport,
    *,
    name: str = "",
    neck: nn.Module | None,
    neck_name: str = "neck",
) -> None:
    """Fill a SamViT, the part `name` of a model, and `neck` with SAM's neck; note it in `report`."""
    state = {key: value for key, value in checkpoint.encoder.items() if not key.startswith("neck.")}
    neck_state = {k.removeprefix("neck."): v for k, v in checkpoint.encoder.items() if k.startswith("neck.")}
    _check_variant(encoder, state, checkpoint.source)

    report.resized.update({_join(name, key): how for key, how in encoder.resize_state(state).items()})
    patch_embed = [key for key in state if key.startswith("patch_embed.")]
    if encoder.in_chans_mode == "learned":
        for key in patch_embed:
            del state[key]
            report.dropped[f"image_encoder.{key}"] = "in_chans_mode='learned'"
    elif "patch_embed.proj.weight" in state:
        weight = state["patch_embed.proj.weight"]
        state["patch_embed.proj.weight"] = adapted = encoder.adapt_input_weight(weight)
        if adapted.shape != weight.shape:
            how = f"{weight.shape[1]} → {adapted.shape[1]} bands, repeated"
            report.resized[_join(name, "patch_embed.proj.weight")] = how

    # LoRA starts anew, and so does a patch embedding that is to be learned. Nothing else may.
    new = {key for key in encoder.state_dict() if ".lora_" in key or key.startswith("neck.")}
    if encoder.in_chans_mode == "learned":
        new.update(patch_embed)
    load_part(encoder, state, report, name, needed=encoder.state_dict().keys() - new)
    if neck is None:
        report.dropped.update({f"image_encoder.neck.{key}": "no neck in this model" for key in neck_state})
    elif neck_state:
        load_part(neck, neck_state, report, neck_name)


def load_sam_encoder(encoder: Any, source: str) -> LoadReport:
    """Load the image encoder of a SAM checkpoint into a SamViT; print and return the report."""
    checkpoint = read_sam(source)
    report = LoadReport(checkpoint.source, checkpoint.sha256)
    load_encoder(encoder, checkpoint, report, neck=encoder.neck)
    report.dropped.update(dict.fromkeys(checkpoint.rest, "not part of an image encoder"))
    report.finish(encoder)
    return report


def load_part(
    module: nn.Module, state: State, report: LoadReport, name: str, *, needed: Iterable[str] | None = None
) -> None:
    """Load `state` into the part `name` of a model: exactly the keys `needed`, or all that the part has."""
    own, source, what = module.state_dict(), report.source, name or "encoder"
    needed = set(own if needed is None else needed)
    unknown = [key for key in state if key not in needed]
    if unknown:
        raise ValueError(
            f"{source}: {len(unknown)} {what} keys match nothing in this model (first: {_first(unknown)}); "
            "give a checkpoint of this model's variant"
        )
    missing = [key for key in own if key in needed and key not in state]
    if missing:
        raise ValueError(
            f"{source}: {len(missing)} {what} keys are missing (first: {_first(missing)}); "
            "give a complete checkpoint of this model's variant"
        )
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise ValueError(
                f"{source}: {what} key {key} has shape {tuple(value.shape)}, this model expects "
                f"{tuple(own[key].shape)}; give a checkpoint of this model's variant"
            )
    module.load_state_dict(state, strict=False)
    report.loaded += [_join(name, key) for key in state]


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _check_variant(encoder: Any, state: State, source: str) -> None:
    """A ViT-L file for a ViT-B model deserves better than a list of keys."""
    blocks = {int(key.split(".")[1]) for key in state if re.match(r"blocks\.\d+\.", key)}
    weight = state.get("patch_embed.proj.weight")
    if weight is None or not blocks:
        return
    found, expected = (weight.shape[0], len(blocks)), (encoder.embed_dim, len(encoder.blocks))
    if found != expected:
        raise ValueError(
            f"{source}: holds a SAM {_variant(found)} encoder, this model has {_variant(expected)}; "
            "give a checkpoint of that variant, or create the model of the checkpoint's"
        )


def _variant(shape: tuple[int, int]) -> str:
    return f"{SAM_VARIANTS.get(shape, 'unpublished')} ({shape[1]} blocks of width {shape[0]})"


def _first(keys: Iterable[str], count: int = 3) -> str:
    return ", ".join(list(keys)[:count])


@torch.no_grad()
def save_encoder(encoder: Any, path: str | os.PathLike[str]) -> None:
    """Save a SamViT as .safetensors in the official layout, LoRA folded in: a base for other models."""
    encoder.merge_lora()
    merged = {
        f"{name}.weight": module.merged_weight
        for name, module in encoder.named_modules()
        if getattr(module, "merged_weight", None) is not None
    }
    encoder.unmerge_lora()
    state = {k: merged.get(k, v) for k, v in encoder.state_dict().items() if ".lora_" not in k}
    save_state({f"image_encoder.{key}": value for key, value in state.items()}, path)


def save_state(
    state: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors to a .safetensors file, all or nothing."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:  # a full disk, most of the time
            raise OSError(f"{path}: cannot be written ({error})") from None


def save_adapter(model: Any, path: str | os.PathLike[str]) -> None:
    """Save only what training changed: trainable parameters and buffers, with the hash of the base weights.

    load_adapter() puts them onto the same model, created from the same base checkpoint.
    """
    if not model.base_weights:
        raise ValueError(
            f"{path}: {model.model_name} was created without pretrained=, so that an adapter has no base; "
            "save the whole model with save_model"
        )
    metadata = {
        "model": model.model_name,
        "arguments": json.dumps(model.arguments),
        "base_weights": model.base_weights,
    }
    save_state(_adapter_state(model), path, metadata)


def load_adapter(model: Any, path: str | os.PathLike[str]) -> None:
    """Load what save_adapter() wrote; another model or other base weights are a ValueError."""
    adapter = read_state(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    for key, own in (("model", model.model_name), ("base_weights", model.base_weights)):
        if metadata.get(key) != own:
            raise ValueError(
                f"{path}: adapter for {key} {metadata.get(key)}, this model has {own}; "
                "create the model by that name and from that checkpoint (pretrained=)"
            )
    load_part(model, adapter, LoadReport(str(path), ""), "", needed=_adapter_state(model).keys())


def _adapter_state(model: nn.Module) -> State:
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    parameters = {name for name, _ in model.named_parameters()}
    return {k: v for k, v in model.state_dict().items() if k in trainable or k not in parameters}
