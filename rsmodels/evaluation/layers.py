"""The maps of a network's layers: of a trained model, as it runs them itself, or of an encoder alone.

Shapes: B batch, C bands, H/W pixels of the network's input, D channels of a layer, h/w its grid.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rsmodels.evaluation.inference import pick_device, pick_dtype
from rsmodels.registry import (
    ENCODERS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocessing,
    create_backbone,
    list_encoders,
    load_model,
)


@dataclass(frozen=True)
class Layers:
    """Some layers of a network, to be called with raw pixels.

    name:    of the model or encoder
    indices: of the layers, ascending from 0
    strides: pixels per cell of each layer's map. A map may cover more than the image: 256 pixels are padded
        to 19 cells of patch 14
    image_size: H and W of the tiles that it takes
    run:     normalised images (B, C, H, W) -> a map (B, D, h, w) per layer
    """

    name: str
    indices: tuple[int, ...]
    strides: tuple[int, ...]
    image_size: tuple[int, int]
    preprocessing: Preprocessing
    device: torch.device
    dtype: torch.dtype
    run: Callable[[Tensor], list[Tensor]]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Tensor]:
        """Raw pixels (B, C, H, W) in the model's band order -> float32 maps (B, D, h, w), one per layer.

        Raises ValueError where finite pixels give maps that are not: broken weights, or an overflow.
        """
        normalised = self.preprocessing.normalize(images.to(self.device))
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            maps = [one.float() for one in self.run(normalised)]
        if not all(one.isfinite().all() for one in maps):
            raise ValueError(
                f"{self.name}: its features are not finite: its weights are damaged or overflow; use another "
                "checkpoint, or --dtype fp32"
            )
        return maps


def open_layers(
    model: str | Path,
    *,
    layers: Sequence[int] | None = None,
    pretrained: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    tile: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> Layers:
    """The layers of a trained model's encoder, or of an encoder by its name.

    Args:
        model: folder with model.json and model.safetensors, or one of list_encoders().
        layers: indices from 0, or from the end as -1; None takes the last one.
        pretrained, model_args: checkpoint and options of an encoder; a trained model has its own.
        tile: side of the input in pixels; None takes the network's own.
        device, dtype: "cpu" or "cuda"; "fp32" or "bf16".

    Raises ValueError or FileNotFoundError where there is no such model, layer or option.
    """
    name, chosen = str(model), pick_device(device)
    size: dict[str, Any] = {} if tile is None else {"image_size": tile}
    network: Any
    if name in ENCODERS and not Path(name).exists():
        network = create_backbone(
            name, out_indices=(-1,), pretrained=pretrained, **size, **(model_args or {})
        ).encoder
        if pretrained is None:
            warnings.warn(f"{name} has random weights; give a checkpoint with --pretrained", stacklevel=2)
        bands = range(getattr(network, "in_chans", 3))
        preprocessing = Preprocessing(
            tuple(IMAGENET_MEAN[i % 3] for i in bands), tuple(IMAGENET_STD[i % 3] for i in bands)
        )
    else:
        _check_folder(name, pretrained, model_args)
        network, _ = load_model(name, device=chosen, **size)
        name, preprocessing = network.model_name, network.preprocessing
    part = _part_with_layers(network, name)
    strides = _strides(part)
    indices = _ascending(layers, len(strides), name)
    network.to(chosen).eval()
    return Layers(
        name=name,
        indices=indices,
        strides=tuple(strides[index] for index in indices),
        image_size=network.image_size,
        preprocessing=preprocessing,
        device=chosen,
        dtype=pick_dtype(dtype, chosen),
        run=lambda images: _maps(network, part, images, indices),
    )


def _check_folder(name: str, pretrained: str | None, model_args: Mapping[str, Any] | None) -> None:
    if not Path(name).is_dir():
        raise ValueError(
            f"--model {name}: neither a folder of a trained model, as runs/x/best, nor an encoder, which are "
            f"{', '.join(list_encoders())}"
        )
    given = ["--pretrained"] * (pretrained is not None) + ["--model-args"] * bool(model_args)
    if given:
        raise ValueError(f"{given[0]} is for an encoder; --model {name} has weights and options of its own")


def _ascending(layers: Sequence[int] | None, depth: int, name: str) -> tuple[int, ...]:
    wanted = (-1,) if layers is None else tuple(layers)
    if not wanted or not all(-depth <= index < depth for index in wanted):
        raise ValueError(
            f"--layers {','.join(map(str, wanted))}: {name} has the layers 0 to {depth - 1}, which may also "
            "be counted from the end, as -1"
        )
    return tuple(sorted({index % depth for index in wanted}))


# ------------------------------------------------------------------------- where a network has its layers


class _Reached(Exception):
    """The maps are there; what comes behind them need not run."""

    def __init__(self, maps: list[Tensor]) -> None:
        self.maps = maps


def _part_with_layers(network: nn.Module, name: str) -> Any:
    """The encoder: a transformer of this library, or a pyramid of timm's."""
    for part in network.modules():
        if hasattr(part, "forward_intermediates") or hasattr(part, "feature_info"):
            return part
    raise ValueError(f"{name}: has no layers that can be looked at, but a decoder only")


def _strides(part: Any) -> tuple[int, ...]:
    if hasattr(part, "feature_info"):
        return tuple(part.feature_info.reduction())
    return (part.image_size[0] // part.grid_size[0],) * len(part.blocks)


def _maps(network: Any, part: Any, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
    """The maps of `part` when `network` runs on `images`: with what the network does to them before and, as
    Rein, between the blocks."""
    if part is network:
        return part.forward_intermediates(images, indices)
    if hasattr(part, "feature_info"):

        def reached(_module: nn.Module, _inputs: Any, stages: list[Tensor]) -> None:
            raise _Reached([stages[index] for index in indices])

        hook = part.register_forward_hook(reached)
        undo = hook.remove
    else:
        run = part.forward_intermediates

        def intermediates(inputs: Tensor, _indices: Sequence[int], **options: Any) -> None:
            raise _Reached(run(inputs, indices, **options))

        part.forward_intermediates = intermediates  # PyTorch's hooks see `forward` alone
        undo = partial(delattr, part, "forward_intermediates")
    try:
        network(images)
    except _Reached as result:
        return result.maps
    finally:
        undo()
    raise AssertionError("the network never called its encoder")
