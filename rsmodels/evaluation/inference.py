"""From raw pixels to class probabilities: normalise, run the model in batches, a tile at a time.

B batch, K logits, H/W pixels of the model's input, C bands.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rsmodels.data.tiling import reflect_to
from rsmodels.registry import Preprocessing

Key = TypeVar("Key")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class SegmentationModel(Protocol):
    """What evaluation and prediction ask of a model; every model of the registry has it."""

    num_classes: int
    image_size: tuple[int, int]
    preprocessing: Preprocessing
    training: bool

    def __call__(self, images: Tensor) -> Tensor: ...
    def probabilities(self, logits: Tensor) -> Tensor: ...
    def train(self, mode: bool = True) -> Any: ...


def pick_device(device: str | None) -> torch.device:
    """The device asked for; without a wish, CUDA where there is one."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r} is not known; use cpu, cuda or cuda:N") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device} was asked for, but this machine offers no CUDA device; use cpu")
    return chosen


def pick_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    """The compute type asked for; without a wish, bf16 on CUDA and fp32 on the CPU."""
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known; use {' or '.join(DTYPES)}")
    return DTYPES[dtype]


@torch.no_grad()
def probabilities(model: SegmentationModel, images: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Class probabilities (B, K, H, W) float32 of raw images (B, C, H, W) on the model's device.

    Raises ValueError where finite pixels give a result that is not: broken weights, or an overflow.
    """
    normalised = model.preprocessing.normalize(images)
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        logits = model(normalised)
    if images.isfinite().all() and not logits.isfinite().all():
        raise ValueError(
            "the model's output is not finite: its weights are damaged or overflow; "
            "use another checkpoint, or --dtype fp32"
        )
    return model.probabilities(logits.float())


def predict_tiles(
    model: SegmentationModel,
    tiles: Iterable[tuple[Key, Tensor | None]],
    *,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    lockstep: bool = False,
) -> Iterator[tuple[Key, Tensor | None]]:
    """Probabilities (K, h, w) on `device` of every tile, in order.

    Args:
        tiles: (key, raw tile (C, h, w)) with h, w at most the model's input; smaller ones are extended by
            mirroring. None, a tile with nothing to look at, comes back as None and costs nothing.
        lockstep: every rank calls the model equally often, the ones that are done on a blank image: a
            sharded model gathers its weights in every call and would wait for the missing ranks.
    """
    batches = _batches(tiles, batch_size)
    if lockstep and dist.is_available() and dist.is_initialized():
        batches = _until_all_are_done(batches, device)
    blank = torch.zeros(len(model.preprocessing.mean), *model.image_size)
    for batch in batches:
        images = [reflect_to(tile, model.image_size) for _, tile in batch if tile is not None]
        if images or lockstep:
            stack = torch.stack(images or [blank]).to(device, torch.float32)
            scores = iter(probabilities(model, stack, dtype=dtype))
        for key, tile in batch:
            yield key, None if tile is None else next(scores)[:, : tile.shape[1], : tile.shape[2]]


def _batches(
    tiles: Iterable[tuple[Key, Tensor | None]], size: int
) -> Iterator[list[tuple[Key, Tensor | None]]]:
    """Lists of consecutive tiles with `size` images to predict among them."""
    batch: list[tuple[Key, Tensor | None]] = []
    images = 0
    for key, tile in tiles:
        batch.append((key, tile))
        images += tile is not None
        if images == size:
            yield batch
            batch, images = [], 0
    if batch:
        yield batch


def _until_all_are_done(batches: Iterator[list], device: torch.device) -> Iterator[list]:
    """This rank's batches, then empty ones until no rank has any left."""
    for batch in itertools.chain(batches, itertools.repeat(None)):
        working = torch.tensor(int(batch is not None), device=device)
        dist.all_reduce(working, op=dist.ReduceOp.MAX)
        if not working:
            return
        yield batch or []
