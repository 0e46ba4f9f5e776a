"""Transforms of whole batches, each a pure function of (batch, generator); nothing hides in global state.

A batch is {"image": float (B, C, H, W), "mask": int64 (B, H, W), "name": [...], "domain": [...]}. Where
tiles differ in size, `collate` and `random_scale` leave "image" and "mask" as lists, and `random_crop`,
`fit_to_size` or `resize` turn them into one tensor. Images hold raw values: what is made up at the border is
0 there and `IGNORE` in the mask, so that it is never learned from. Random numbers come from the generator
alone, on its own device; work happens on the device of the images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rsmodels.data.schema import IGNORE

Batch = dict[str, Any]
Size = int | tuple[int, int]
LUMA = (0.299, 0.587, 0.114)
CROP_ATTEMPTS = 10


def collate(samples: Sequence[dict[str, Any]]) -> Batch:
    """Join samples; tensors are stacked where all tiles are of one size, and kept as lists otherwise."""
    if not samples:
        raise ValueError("a batch needs at least one sample")
    check_same_bands(samples)
    batch: Batch = {key: [sample[key] for sample in samples] for key in samples[0]}
    if len({sample["mask"].shape for sample in samples}) == 1:
        batch["image"] = torch.stack(batch["image"])
        batch["mask"] = torch.stack(batch["mask"])
    return batch


def check_same_bands(samples: Sequence[dict[str, Any]]) -> None:
    """Samples that differ in their number of bands are a ValueError that names two of them."""
    channels = samples[0]["image"].shape[0]
    for sample in samples:
        if sample["image"].shape[0] != channels:
            raise ValueError(
                f"{sample['name']} has {sample['image'].shape[0]} bands, {samples[0]['name']} {channels}; "
                "choose common bands with `bands`"
            )


# ---------------------------------------------------------------------------------------------- geometry


def resize_image(image: Tensor, size: Size) -> Tensor:
    """(C, H, W) or (B, C, H, W) -> `size`, bilinear, antialiased where it shrinks."""
    height, width = _pair(size)
    batched = image if image.ndim == 4 else image[None]
    out = F.interpolate(batched, (height, width), mode="bilinear", align_corners=False, antialias=True)
    return out if image.ndim == 4 else out[0]


def resize_mask(mask: Tensor, size: Size) -> Tensor:
    """(H, W) or (B, H, W) train ids -> `size`; the nearest id, none is ever mixed."""
    height, width = _pair(size)
    rows = _nearest(mask.shape[-2], height, mask.device)
    columns = _nearest(mask.shape[-1], width, mask.device)
    return mask[..., rows[:, None], columns]


def resize(batch: Batch, size: Size) -> Batch:
    """Every tile to `size`, whatever its shape; the result is one tensor."""
    return _each(batch, lambda image, mask, _: (resize_image(image, size), resize_mask(mask, size)))


def fit_to_size(batch: Batch, size: Size, mode: Literal["pad", "resize"] = "pad") -> Batch:
    """Every tile to `size` without chance, for validation.

    pad:    the centre of a larger tile; a smaller one is padded at the bottom and right, as `IGNORE`
    resize: stretched to the size (the RS-SAM recipe: 1024 -> 512)
    """
    if mode == "resize":
        return resize(batch, size)
    if mode != "pad":
        raise ValueError(f"mode {mode!r} is not one of pad, resize")
    height, width = _pair(size)

    def centre(image: Tensor, mask: Tensor, _: int) -> tuple[Tensor, Tensor]:
        top = max(0, (mask.shape[-2] - height) // 2)
        left = max(0, (mask.shape[-1] - width) // 2)
        return _cut(image, mask, top, left, height, width)

    return _each(batch, centre)


def random_scale(batch: Batch, size: Size, scale: tuple[float, float], generator: torch.Generator) -> Batch:
    """Resize every tile so that its short side is a random share of the shorter side of `size`.

    scale: least and largest share, drawn uniformly between them; (0.5, 2) is CrossEarth's and Rein's recipe
    The long side stays within twice the largest short side, as in their code: an elongated tile is resized to
    that instead. The result is two lists: tiles differ in size now.
    """
    low, high = scale
    side = min(_pair(size))
    draws = torch.rand(len(batch["image"]), generator=generator, device=generator.device).tolist()
    images, masks = [], []
    for image, mask, draw in zip(batch["image"], batch["mask"], draws, strict=True):
        short, long = sorted(mask.shape)
        factor = min(side * (low + (high - low) * draw) / short, 2 * side * high / long)
        resized = tuple(max(1, round(length * factor)) for length in mask.shape)
        images.append(resize_image(image, resized))
        masks.append(resize_mask(mask, resized))
    return {**batch, "image": images, "mask": masks}


def random_crop(
    batch: Batch, size: Size, generator: torch.Generator, *, max_class_share: float | None = None
) -> Batch:
    """A window of `size` from every tile, uniformly placed; a smaller tile is padded, as `IGNORE`.

    max_class_share: take the first of ten windows in which no class has more than this share of the labelled
        pixels, and the last of them where none is so mixed
    """
    height, width = _pair(size)
    attempts = 1 if max_class_share is None else CROP_ATTEMPTS
    # All at once: how many of them are looked at must not move the random numbers of what comes after.
    draws = torch.rand(
        attempts, len(batch["image"]), 2, generator=generator, device=generator.device
    ).tolist()

    def window(image: Tensor, mask: Tensor, index: int) -> tuple[Tensor, Tensor]:
        room_y = max(0, mask.shape[-2] - height)
        room_x = max(0, mask.shape[-1] - width)
        for attempt in draws:
            top = min(room_y, int(attempt[index][0] * (room_y + 1)))
            left = min(room_x, int(attempt[index][1] * (room_x + 1)))
            if max_class_share is None or not (room_y or room_x):
                break  # there is nothing to choose from
            if largest_class_share(mask[top : top + height, left : left + width]) <= max_class_share:
                break
        return _cut(image, mask, top, left, height, width)

    return _each(batch, window)


def largest_class_share(mask: Tensor) -> float:
    """The most frequent class's share of the labelled pixels of `mask` (int64); 1 where none is labelled."""
    labelled = mask[mask != IGNORE]
    if not labelled.numel():
        return 1.0
    return labelled.bincount().max().item() / labelled.numel()


def random_flip(
    batch: Batch, generator: torch.Generator, *, horizontal: float = 0.5, vertical: float = 0.5
) -> Batch:
    """Mirror each tile of a stacked batch with the given probabilities. Seen from above, both are natural."""
    image, mask = _stacked(batch)
    draws = torch.rand(2, len(image), generator=generator, device=generator.device).to(image.device)
    for axis, chosen in ((-1, draws[0] < horizontal), (-2, draws[1] < vertical)):
        image = torch.where(chosen[:, None, None, None], image.flip(axis), image)
        mask = torch.where(chosen[:, None, None], mask.flip(axis), mask)
    return {**batch, "image": image, "mask": mask}


# --------------------------------------------------------------------------------------------- photometry


def photometric(
    batch: Batch,
    generator: torch.Generator,
    *,
    brightness: float = 0.125,
    contrast: float = 0.5,
    saturation: float = 0.5,
) -> Batch:
    """Photometric distortion of raw values, per tile: each of the three with probability 0.5.

    brightness: adds up to ± this share of the tile's own range, whatever the file's type
    contrast:   scales about the tile's mean by 1 ± contrast
    saturation: scales about the grey image by 1 ± saturation (three-band images only)
    Empty pixels (`IGNORE`, and 0 in every band) stay empty and count for neither range nor mean. Nothing is
    clipped: the library does not know where the sensor saturates.
    """
    image, mask = _stacked(batch)
    draws = torch.rand(6, len(image), generator=generator, device=generator.device)
    draws = draws.to(image.device, image.dtype)[:, :, None, None, None]
    strength = torch.where(draws[3:] < 0.5, draws[:3] * 2 - 1, torch.zeros_like(draws[:3]))

    data = ~((mask == IGNORE)[:, None] & (image == 0).all(1, keepdim=True))
    count = (data.sum((1, 2, 3), keepdim=True) * image.shape[1]).clamp(min=1)
    low = image.where(data, image.new_tensor(torch.inf)).amin((1, 2, 3), keepdim=True)
    high = image.where(data, image.new_tensor(-torch.inf)).amax((1, 2, 3), keepdim=True)
    span = (high - low).clamp(min=0)  # a tile without data has none

    out = image + strength[0] * brightness * span
    mean = (out * data).sum((1, 2, 3), keepdim=True) / count
    out = mean + (out - mean) * (1 + strength[1] * contrast)
    if image.shape[1] == 3:
        grey = (out * image.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)
        out = grey + (out - grey) * (1 + strength[2] * saturation)
    return {**batch, "image": torch.where(data, out, image)}


# ------------------------------------------------------------------------------------------------ helpers


def _pair(size: Size) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"size {size} is not a number of pixels")
    return height, width


def _nearest(source: int, target: int, device: torch.device) -> Tensor:
    """Index of the source pixel under each target pixel's centre."""
    centres = (torch.arange(target, device=device) * 2 + 1) * source // (2 * target)
    return centres.clamp(max=source - 1)


def _cut(image: Tensor, mask: Tensor, top: int, left: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    image = image[..., top : top + height, left : left + width]
    mask = mask[..., top : top + height, left : left + width]
    missing = (0, width - mask.shape[-1], 0, height - mask.shape[-2])
    if any(missing):
        image, mask = F.pad(image, missing), F.pad(mask, missing, value=IGNORE)
    return image, mask


def _each(batch: Batch, change: Any) -> Batch:
    done = [
        change(image, mask, index)
        for index, (image, mask) in enumerate(zip(batch["image"], batch["mask"], strict=True))
    ]
    return {
        **batch,
        "image": torch.stack([image for image, _ in done]),
        "mask": torch.stack([mask for _, mask in done]),
    }


def _stacked(batch: Batch) -> tuple[Tensor, Tensor]:
    image, mask = batch["image"], batch["mask"]
    if not isinstance(image, Tensor):
        sizes = sorted({tuple(one.shape) for one in mask})
        raise ValueError(f"the batch holds tiles of sizes {sizes}; crop or fit them to one size first")
    return image, mask
