"""From raw pixels to class probabilities: normalise, run the model in batches, a tile at a time.

B batch, K logits, H/W pixels of the model's input, C bands.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rsmodels.data.tiling import reflect_to
from rsmodels.evaluation.cuda_graphs import GraphedForward
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


def check_cuda_graph(cuda_graph: bool, device: torch.device) -> None:
    """Refuse a CUDA graph where there can be none."""
    if not cuda_graph:
        return
    if device.type != "cuda":
        raise ValueError(f"cuda_graph: the device is {device}; use a cuda device, or leave cuda_graph out")
    if dist.is_available() and dist.is_initialized():
        raise ValueError(
            f"cuda_graph: {dist.get_world_size()} processes may share the model, and what they exchange "
            "cannot be recorded; leave cuda_graph out, or use one process"
        )


def predict_tiles(
    model: SegmentationModel,
    tiles: Iterable[tuple[Key, Tensor | None]],
    *,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    lockstep: bool = False,
    cuda_graph: bool = False,
) -> Iterator[tuple[Key, Tensor | None]]:
    """Probabilities (K, h, w) float32 on `device` of every tile, in order.

    The tiles of a batch are read while the device computes the one before.

    Args:
        tiles: (key, raw tile (C, h, w)) with h, w at most the model's input; smaller ones are extended by
            mirroring. None, a tile with nothing to look at, comes back as None and costs nothing.
        lockstep: every rank calls the model equally often, the ones that are done on a blank image: a
            sharded model gathers its weights in every call and would wait for the missing ranks.
        cuda_graph: replay full batches from a CUDA graph, see GraphedForward and check_cuda_graph.
    Raises:
        ValueError: finite pixels give a result that is not: broken weights, or an overflow.
    """
    batches = _batches(tiles, batch_size)
    if lockstep and dist.is_available() and dist.is_initialized():
        batches = _until_all_are_done(batches, device)
    size = model.image_size
    blank = torch.zeros(len(model.preprocessing.mean), *size)
    forward: Callable[[Tensor], Tensor] = partial(_logits, model, dtype=dtype)
    if cuda_graph:
        forward = GraphedForward(forward, (batch_size, *blank.shape))
    staged = _staged(batches, size, device, blank if lockstep else None)
    step = next(staged, None)
    while step is not None:
        batch, images = step
        if images is not None:
            probabilities, broken = _probabilities(model, forward, images)
        step = next(staged, None)
        if images is not None:
            if broken:  # asked after the next batch was read: here the host waits
                raise ValueError(
                    "the model's output is not finite: its weights are damaged or overflow; "
                    "use another checkpoint, or --dtype fp32"
                )
            scores = iter(probabilities)
        for key, tile in batch:
            yield key, None if tile is None else next(scores)[:, : tile.shape[1], : tile.shape[2]]


@torch.no_grad()
def _probabilities(
    model: SegmentationModel, forward: Callable[[Tensor], Tensor], images: Tensor
) -> tuple[Tensor, Tensor]:
    """Class probabilities (B, K, H, W) float32 of raw images, and whether finite pixels gave what is not."""
    logits = forward(model.preprocessing.normalize(images))
    broken = images.isfinite().all() & ~logits.isfinite().all()
    return model.probabilities(logits.float()), broken


def _logits(model: SegmentationModel, normalised: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.autocast(normalised.device.type, dtype, enabled=dtype != torch.float32):
        return model(normalised)


def _staged(
    batches: Iterable[list[tuple[Key, Tensor | None]]],
    size: tuple[int, int],
    device: torch.device,
    blank: Tensor | None,
) -> Iterator[tuple[list[tuple[Key, Tensor | None]], Tensor | None]]:
    """Every batch with its images (B, C, H, W) float32 on `device`; without any, the blank one, or None."""
    for batch in batches:
        images = [reflect_to(tile, size) for _, tile in batch if tile is not None]
        if not images and blank is not None:
            images = [blank]
        if not images:
            yield batch, None
            continue
        stack = torch.stack(images)
        if device.type == "cuda":  # from pinned memory the copy runs beside the host
            stack = stack.pin_memory()
        yield batch, stack.to(device, non_blocking=True).float()


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
