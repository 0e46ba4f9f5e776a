"""Overlapping tiles over an image of any size, and how the tiles' scores blend into one map.

Along each axis the tiles are spread evenly, the first at the start and the last flush with the end, so that
neighbours overlap by at least the share asked for. Every tile is weighted by a Hann window, normalised by
the sum over all tiles that cover the pixel: the weights of a pixel add up to one, and no tile's border shows.
Windows are separable, so two short lists of vectors hold every weight, whatever the size of the image.

K channels (classes), H/W pixels of the image, h/w pixels of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """A rectangle of the image. An image smaller than the tile gives a rectangle of the image's own size."""

    row: int
    column: int
    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class TileAxis:
    """Tiles along one axis: where each starts, and its weight at every pixel."""

    length: int
    tile: int
    overlap: float
    starts: tuple[int, ...] = field(init=False)
    weights: tuple[Tensor, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.length < 1 or self.tile < 1:
            raise ValueError(f"cannot tile {self.length} pixels by {self.tile}: both must be at least 1")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap {self.overlap} is not in [0, 1): 0.25 shares a quarter of each tile")
        stride = max(1, math.floor(self.tile * (1 - self.overlap)))
        last = max(self.length - self.tile, 0)
        count = math.ceil(last / stride) + 1
        starts = [last * index // max(count - 1, 1) for index in range(count)]

        size = min(self.tile, self.length)
        # Sampled at pixel centres the window is nowhere zero: what only a tile's rim covers has weight, too.
        centres = torch.arange(size, dtype=torch.float64) + 0.5
        window = torch.sin(math.pi * centres / size) ** 2
        total = torch.zeros(self.length, dtype=torch.float64)
        for start in starts:
            total[start : start + size] += window
        weights = tuple((window / total[start : start + size]).float() for start in starts)
        object.__setattr__(self, "starts", tuple(starts))
        object.__setattr__(self, "weights", weights)


@dataclass(frozen=True)
class TileGrid:
    """Tiles of (h, w) pixels over an image of (H, W), neighbours sharing at least `overlap` of their side.

    >>> [(tile.top, tile.left) for tile in TileGrid((64, 100), tile=(64, 64), overlap=0.25)]
    [(0, 0), (0, 36)]
    """

    size: tuple[int, int]
    tile: tuple[int, int]
    overlap: float = 0.25
    rows: TileAxis = field(init=False, repr=False)
    columns: TileAxis = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", TileAxis(self.size[0], self.tile[0], self.overlap))
        object.__setattr__(self, "columns", TileAxis(self.size[1], self.tile[1], self.overlap))

    def __len__(self) -> int:
        return len(self.rows.starts) * len(self.columns.starts)

    def __iter__(self) -> Iterator[Tile]:
        """Every tile, row by row."""
        height, width = min(self.size[0], self.tile[0]), min(self.size[1], self.tile[1])
        for row, top in enumerate(self.rows.starts):
            for column, left in enumerate(self.columns.starts):
                yield Tile(row, column, top, left, height, width)

    def weights(self, tile: Tile) -> Tensor:
        """Blending weights (h, w) float32 of one tile; over all tiles they add up to one at every pixel."""
        return torch.outer(self.rows.weights[tile.row], self.columns.weights[tile.column])


def reflect_to(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Extend (..., H, W) at the bottom and right to at least `size` by mirroring, as often as it takes."""
    for axis, target in zip((-2, -1), size, strict=True):
        length = image.shape[axis]
        if length < target:
            position = torch.arange(target, device=image.device) % max(2 * (length - 1), 1)
            mirrored = torch.minimum(position, 2 * (length - 1) - position)
            image = image.index_select(axis, mirrored)
    return image


def blend_rows(
    grid: TileGrid,
    scores: Iterable[tuple[Tile, Tensor | None]],
    *,
    channels: int,
    align: int = 1,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[int, Tensor]]:
    """Blend the tiles' scores and hand out every band of rows as soon as no later tile can change it.

    Args:
        grid: the tiles.
        scores: (tile, scores (K, tile.height, tile.width)) in the grid's order; None stands for zeros.
        channels: K.
        align: bands start at multiples of this many rows, e.g. the block size of the file they go to.
        device: where the scores are, and the bands will be.

    Yields:
        (first row, band (K, rows, W) float32). The band is a view that the next step overwrites.

    Only one row of tiles is in memory, K * (h + align) * W numbers, however tall the image is.
    """
    height, width = grid.size
    rows = min(grid.tile[0] + align - 1, height)
    buffer = torch.zeros(channels, rows, width, device=device)
    top = 0
    for tile, score in scores:
        finished = tile.top // align * align - top
        if finished > 0:
            yield top, buffer[:, :finished]
            kept = rows - finished
            buffer[:, :kept] = buffer[:, finished:].clone()
            buffer[:, kept:] = 0
            top += finished
        if score is not None:
            part = buffer[:, tile.top - top :, tile.left :][:, : tile.height, : tile.width]
            part.addcmul_(score.float(), grid.weights(tile).to(device, non_blocking=True))
    yield top, buffer[:, : height - top]
