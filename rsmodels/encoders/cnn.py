"""Any four-stage network of timm as an encoder (https://github.com/huggingface/pytorch-image-models)."""

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rsmodels.weights import LoadReport, load_part, read_state, resolve, sha256_of

REDUCTIONS = [4, 8, 16, 32]
# What timm calls the layouts of a map (timm.layers.Format).
LAYOUTS = ("NCHW", "NHWC")


def timm_stages(name: str, *, image_size: tuple[int, int] | None = None, **options: Any) -> Any:
    """timm's create_model(name, features_only=True): images → maps at 1/4, 1/8, 1/16, 1/32 (see stage_maps).

    Args:
        name: a timm model whose last four stages are at 1/4, 1/8, 1/16 and 1/32 of the input.
        image_size: H and W of the images; networks that are built for one size, as Swin's are, get this one,
            and one that cannot take it is a ValueError.
        options: timm's own, e.g. drop_path_rate; weights are loaded by the caller.
    """
    import timm  # imports torchvision and Pillow, which other models do without

    given = options
    try:
        known = timm.get_pretrained_cfg(name)
        if image_size is not None and known is not None and known.fixed_input_size:
            options = {"img_size": image_size, **options}
        network: Any = timm.create_model(name, pretrained=False, features_only=True, out_indices=4, **options)
    except Exception as error:  # timm checks few options: a wrong one ends as whatever it leads to
        raise ValueError(
            f"student {name!r}: timm cannot build it as a feature pyramid with the options {options} "
            f"({_reason(error)}); see timm.list_models() for names, and the network for its options"
        ) from None
    reductions = network.feature_info.reduction()
    if reductions != REDUCTIONS:
        raise ValueError(
            f"student {name!r}: its last stages are at 1/{', 1/'.join(map(str, reductions))} of the input; "
            "expected four at 1/4, 1/8, 1/16 and 1/32, as those of convnext_base or resnet50"
        )
    if _layout(network) not in LAYOUTS:
        raise ValueError(
            f"student {name!r}: hands out its stages as {_layout(network)}; expected maps, "
            f"{' or '.join(LAYOUTS)}, as those of convnext_base or swin_tiny_patch4_window7_224"
        )
    if image_size is not None:
        _check_size(network, name, image_size, given.get("in_chans", 3))
    return network


def _check_size(network: Any, name: str, image_size: tuple[int, int], channels: int) -> None:
    """ValueError where the network cannot take images of this size; two of them, without their numbers."""
    images = torch.empty(2, channels, *image_size, device="meta")
    tensors = itertools.chain(network.named_parameters(), network.named_buffers())
    try:
        with torch.no_grad():
            functional_call(network, {key: value.to("meta") for key, value in tensors}, (images,))
    except NotImplementedError:  # PyTorch's, of an operation that has no meta kernel: nothing of the size
        return
    except Exception as error:
        raise ValueError(
            f"student {name!r}: cannot take images of {image_size[0]}x{image_size[1]} pixels "
            f"({_reason(error)}); choose another image size, or another student, as convnext_base"
        ) from None


def _reason(error: Exception) -> str:
    """The error in one line that is never empty."""
    return " ".join(str(error).split()) or type(error).__name__


def stage_maps(network: Any, images: Tensor) -> list[Tensor]:
    """The maps (B, C_i, ·, ·) that a network of timm_stages gives, channels first however it keeps them."""
    maps = network(images)
    return [level.permute(0, 3, 1, 2) for level in maps] if _layout(network) == "NHWC" else maps


def checkpoint_stages(network: Any, name: str, enabled: bool) -> None:
    """Recompute the activations of a network of timm_stages in backward; ValueError where it cannot."""
    switch = getattr(network, "set_grad_checkpointing", None)
    switch = switch or getattr(_whole(network), "set_grad_checkpointing", None)
    try:
        if switch is not None:
            switch(enabled)
            return
    except AssertionError:  # how timm says that a network has none
        pass
    if enabled:
        raise ValueError(
            f"activation checkpointing: student {name!r} of timm has none; leave it out, or choose another "
            "student, as convnext_base"
        )


def load_timm_stages(model: nn.Module, part: str, source: str, *, advice: str = "") -> LoadReport:
    """Load timm's weights of a whole network into the feature pyramid `part` of `model`; print and return the
    report. What comes behind the last stage, such as the classifier, is dropped.

    advice: where else a file of another network may belong.
    """
    path = resolve(source)
    network: Any = model.get_submodule(part)
    stages = _whole(network)
    # timm flattens the names of a pyramid's stages: stages.0.blocks becomes stages_0.blocks.
    own = {key.replace(".", "_"): key for key in stages.state_dict()}
    children = tuple(f"{name}_" for name, child in stages.named_children() if child.state_dict())
    report = LoadReport(str(source), sha256_of(path))
    state, found = {}, read_state(path)
    matching = sum(key.replace(".", "_") in own for key in found)
    if 2 * matching < len(own):
        raise ValueError(
            f"{source}: not weights of this {part} (first keys: {', '.join(list(found)[:3])}); give timm's "
            f"of that network{advice}"
        )
    for key, value in found.items():
        flat = key.replace(".", "_")
        if flat in own or flat.startswith(children):
            state[own.get(flat, key)] = value
        else:
            report.dropped[key] = "behind the last stage"
    try:
        load_part(stages, state, report, part if stages is network else f"{part}.model")
    except ValueError as error:
        published = network.pretrained_cfg
        if not published["fixed_input_size"]:
            raise
        height, width = published["input_size"][1:]
        raise ValueError(
            f"{error}; this network is built for one image size: take that of the weights, as published "
            f"{height}x{width}"
        ) from None
    report.finish(model)
    return report


def _whole(network: Any) -> Any:
    """The network itself: timm takes most apart into their stages, and wraps the others whole as `.model`."""
    return getattr(network, "model", network)


def _layout(network: Any) -> str:
    layout = getattr(network, "output_fmt", LAYOUTS[0])
    return getattr(layout, "value", layout)
