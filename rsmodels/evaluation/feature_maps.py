"""Layers over whole images: tiles read, run and blended, or a few features drawn from them at random.

Images of any size are covered by overlapping tiles of the network's input, as predictions are. A *cell* is a
square of pixels that a picture has one value for.

D channels of a layer, h/w its grid, h'/w' pixels of a tile, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from rasterio.windows import Window
from torch import Tensor

from rsmodels.data import IGNORE
from rsmodels.data.tiling import Tile, TileGrid, blend_rows, reflect_to
from rsmodels.evaluation.layers import Layers

MAX_CELLS = 2048  # longest side of a blended map, in cells
PROJECTED = 4  # channels of what a layer is drawn by
Item = TypeVar("Item")


class Readable(Protocol):
    """An open image: its height and width, and pixels (C, h', w') with which of them are valid, (h', w')."""

    @property
    def size(self) -> tuple[int, int]: ...
    def read(self, window: Window) -> tuple[np.ndarray, np.ndarray]: ...


class Held:
    """A sample of a data set as a Readable, with its labels (H, W)."""

    def __init__(self, sample: dict[str, Any]) -> None:
        self.pixels: np.ndarray = sample["image"].numpy()
        self.labels: np.ndarray = sample["mask"].numpy()
        self.valid = ~((self.labels == IGNORE) & (self.pixels == 0).all(axis=0))

    @property
    def size(self) -> tuple[int, int]:
        return self.labels.shape[0], self.labels.shape[1]

    def read(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
        rows, columns = window.toslices()
        return self.pixels[:, rows, columns], self.valid[rows, columns]


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most `most` of the items, evenly spread, in their order."""
    if len(items) <= most:
        return list(items)
    return [items[(2 * index + 1) * len(items) // (2 * most)] for index in range(most)]


def overview(image: Readable, longest: int) -> np.ndarray:
    """The raw pixels (C, H/k, W/k), every k-th of them, so that no side is longer than `longest`."""
    height, width = image.size
    step = -(-max(height, width) // longest)
    block = max(1, longest // step) * step
    rows = []
    for top in range(0, height, block):
        parts = []
        for left in range(0, width, block):
            window = Window(left, top, min(block, width - left), min(block, height - top))
            parts.append(image.read(window)[0][:, ::step, ::step])
        rows.append(np.concatenate(parts, axis=2))
    return np.concatenate(rows, axis=1)


def tile_maps(
    layers: Layers, image: Readable, corners: Iterable[tuple[Item, int, int]], batch_size: int
) -> Iterator[tuple[Item, np.ndarray, list[Tensor]]]:
    """(key, valid (h', w') bool, maps (D, h, w), one per layer) of the tiles with the upper left corners
    (key, top, left). A tile without a valid pixel has no maps and costs nothing; one that the border cuts off
    is extended by mirroring, and so are its maps."""
    batch: list[tuple[Item, np.ndarray]] = []
    inputs: list[Tensor] = []

    def run() -> Iterator[tuple[Item, np.ndarray, list[Tensor]]]:
        maps = layers(torch.stack(inputs)) if inputs else []
        each = iter(zip(*maps, strict=True))
        for key, valid in batch:
            yield key, valid, list(next(each)) if valid.any() else []

    height, width = image.size
    for key, top, left in corners:
        size = min(layers.image_size[1], width - left), min(layers.image_size[0], height - top)
        pixels, valid = image.read(Window(left, top, *size))
        if valid.any():
            batch.append((key, valid))
            inputs.append(reflect_to(torch.from_numpy(pixels), layers.image_size))
        else:  # however many of them lie between two others, they take no memory
            batch.append((key, np.broadcast_to(np.False_, valid.shape)))
        if len(inputs) == batch_size:
            yield from run()
            batch, inputs = [], []
    yield from run()


def sample_features(
    layers: Layers,
    image: Readable,
    *,
    tiles: int,
    count: int,
    batch_size: int,
    rng: np.random.Generator,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per layer, features (N, D) of at most `count` cells in at most `tiles` tiles, and their labels (N,).

    A cell is judged by the pixel at its centre: empty ones are left out, and unlabelled ones where the image
    has labels (else all are 0).
    """
    labels: np.ndarray | None = getattr(image, "labels", None)
    chosen = spread(list(TileGrid(image.size, layers.image_size, overlap=0)), tiles)
    share = -(-count // len(chosen))
    found: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in layers.indices]
    corners = ((tile, tile.top, tile.left) for tile in chosen)
    for tile, valid, maps in tile_maps(layers, image, corners, batch_size):
        if not maps:
            continue
        for parts, one, stride in zip(found, maps, layers.strides, strict=True):
            centres = [np.arange(cells) * stride + stride // 2 for cells in one.shape[-2:]]
            rows, columns = (line[line < side] for line, side in zip(centres, valid.shape, strict=True))
            usable = valid[np.ix_(rows, columns)]
            kinds = np.zeros(usable.shape, np.int64)
            if labels is not None:
                kinds = labels[np.ix_(rows + tile.top, columns + tile.left)]
                usable = usable & (kinds != IGNORE)
            cells = rng.permutation(np.flatnonzero(usable))[:share]
            values = one[:, : len(rows), : len(columns)].flatten(1).T
            parts.append((values[torch.from_numpy(cells)].cpu().numpy(), kinds.reshape(-1)[cells]))
    return [_joined(parts, count) for parts in found]


def _joined(parts: list[tuple[np.ndarray, np.ndarray]], count: int) -> tuple[np.ndarray, np.ndarray]:
    if not parts:
        return np.zeros((0, 0), np.float32), np.zeros(0, np.int64)
    values, kinds = (np.concatenate(several) for several in zip(*parts, strict=True))
    return values[:count], kinds[:count]


def cell_side(layers: Layers, size: tuple[int, int]) -> int:
    """Pixels per cell: the finest layer's stride, or as many of it as keep a large image within MAX_CELLS."""
    finest = min(layers.strides)
    wanted = -(-max(size) // (MAX_CELLS * finest))
    return finest * min(wanted, min(layers.image_size) // finest)


def blended_maps(
    layers: Layers,
    image: Readable,
    project: Sequence[Callable[[Tensor], Tensor]],
    *,
    overlap: float,
    batch_size: int,
    progress: Callable[[Iterable[Tile]], Iterable[Tile]] = iter,
) -> tuple[np.ndarray, np.ndarray]:
    """What `project` makes of every layer's map, (D, h, w) -> (4, h, w), over the whole image.

    (L, 4, rows, columns) float32 in cells of `cell_side`, and which cells have a valid pixel (rows, columns).
    """
    side = cell_side(layers, image.size)
    finest = min(layers.strides)
    rows, columns = (-(-length // side) for length in image.size)
    grid = TileGrid(
        (rows, columns), (layers.image_size[0] // side, layers.image_size[1] // side), overlap=overlap
    )
    corners = ((tile, tile.top * side, tile.left * side) for tile in progress(grid))

    def in_cells(tile: Tile, valid: np.ndarray, maps: list[Tensor]) -> Tensor:
        values = [
            _pooled(apply(one), enlarge=stride // finest, shrink=side // finest)
            for apply, one, stride in zip(project, maps, layers.strides, strict=True)
        ]
        covered = np.zeros((tile.height * side, tile.width * side), np.float32)
        inside = valid[: covered.shape[0], : covered.shape[1]]
        covered[: inside.shape[0], : inside.shape[1]] = inside
        seen = F.max_pool2d(torch.from_numpy(covered)[None], side).to(values[0])
        return torch.cat([one[:, : tile.height, : tile.width] for one in (*values, seen)])

    scores = (
        (tile, in_cells(tile, valid, maps) if maps else None)
        for tile, valid, maps in tile_maps(layers, image, corners, batch_size)
    )
    channels = PROJECTED * len(layers.indices) + 1
    result = np.empty((channels, rows, columns), np.float32)
    for top, band in blend_rows(grid, scores, channels=channels, device=layers.device):
        result[:, top : top + band.shape[1]] = band.cpu().numpy()
    return result[:-1].reshape(len(layers.indices), PROJECTED, rows, columns), result[-1] > 0.5


def _pooled(values: Tensor, *, enlarge: int, shrink: int) -> Tensor:
    """(P, h, w) interpolated to the finest layer's grid, and averaged over the cells of a large image."""
    x = values[None]
    if enlarge > 1:
        x = F.interpolate(x, scale_factor=enlarge, mode="bilinear", align_corners=False)
    return (F.avg_pool2d(x, shrink) if shrink > 1 else x)[0]
